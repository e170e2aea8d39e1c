"""A small ggml: the tensors of a compute graph, by shape alone, in the order in which llama.cpp evaluates them.

Only what decides how much memory a graph takes is kept: an operation's name, its shape, what it reads, and what it is
a view of. Shapes are in ggml's order, fastest dimension first, always four numbers.
Source: llama.cpp b11434, ggml/src/ggml.c.
"""

from __future__ import annotations

from typing import Final

Ne = tuple[int, int, int, int]

F16: Final = 2  # bytes of an element; computed tensors are f32 (or i32) unless said otherwise
F32: Final = 4
I64: Final = 8


class Node:
    """One tensor. `home` is the backend whose memory holds it already (weights, caches); None: to be allocated."""

    __slots__ = (
        "backend", "extra", "home", "is_input", "is_output", "is_weight", "n_bytes", "n_children", "n_views", "ne",
        "offset", "op", "owned", "pending", "place", "seen", "size", "src", "view",
    )  # fmt: skip

    def __init__(self, op: str, ne: Ne, n_bytes: int, src: tuple[Node, ...] = (), view: Node | None = None) -> None:
        self.op = op
        self.ne = ne
        self.n_bytes = n_bytes
        self.src = src
        self.view: Node | None = view if view is None or view.view is None else view.view
        self.home: int | None = None
        self.is_weight = self.is_input = False
        self.is_output = False  # kept until the graph has run
        self.seen = False
        self.extra = 0  # scratch bytes CUDA reserves behind it
        self.backend = -1
        self.n_children = self.n_views = 0
        self.pending = view is None  # still to be given memory
        self.owned = False  # has memory of the allocator, to be given back: of backend `place`, at `offset`
        self.place = self.offset = self.size = 0

    def settle(self, home: int) -> Node:
        """The same node, in memory that backend `home` holds already."""
        self.home = home
        self.pending = False
        return self


def tensor(op: str, ne: Ne, *src: Node, width: int = F32) -> Node:
    """A new tensor of that shape."""
    return Node(op, ne, ne[0] * ne[1] * ne[2] * ne[3] * width, src)


def like(op: str, first: Node, *others: Node) -> Node:
    """An element-wise operation: shaped as its first source."""
    return Node(op, first.ne, 4 * first.ne[0] * first.ne[1] * first.ne[2] * first.ne[3], (first, *others))


def view(source: Node, ne: Ne, op: str = "view") -> Node:
    """Another look at the same memory."""
    return Node(op, ne, ne[0] * ne[1] * ne[2] * ne[3] * 4, (source,), source)


def reshape(source: Node, ne0: int, ne1: int, ne2: int = 1, ne3: int = 1) -> Node:
    return view(source, (ne0, ne1, ne2, ne3), "reshape")


def permute(source: Node) -> Node:
    """Dimensions 1 and 2 exchanged: between heads-by-token and tokens-by-head."""
    ne = source.ne
    return Node("permute", (ne[0], ne[2], ne[1], ne[3]), source.n_bytes, (source,), source)


def mul_mat(weight: Node, x: Node) -> Node:
    return tensor("mul_mat", (weight.ne[1], x.ne[1], x.ne[2], x.ne[3]), weight, x)


def mul_mat_id(weight: Node, x: Node, ids: Node) -> Node:
    """Each token through its own experts. `ids`: (n_expert_used, n_tokens)."""
    return tensor("mul_mat_id", (weight.ne[1], ids.ne[0], x.ne[2], 1), weight, x, ids)


def get_rows(table: Node, ids: Node) -> Node:
    return tensor("get_rows", (table.ne[0], ids.ne[0], ids.ne[1], ids.ne[2]), table, ids)


def glu(gate: Node, up: Node) -> Node:
    """A gated activation of two tensors (swiglu_split and its kin)."""
    return like("glu", gate, up)


def set_rows(cache: Node, rows: Node, ids: Node) -> Node:
    """`rows` written into `cache`: a view of it."""
    return Node("set_rows", cache.ne, cache.n_bytes, (rows, ids, cache), cache)


class Graph:
    """Nodes and leaves in evaluation order."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.leaves: list[Node] = []

    def input(self, *ne: int, width: int = F32) -> Node:
        """A tensor filled in by the host before each run."""
        shape = (*ne, 1, 1, 1)[:4]
        node = tensor("none", (shape[0], shape[1], shape[2], shape[3]), width=width)
        node.is_input = True
        return node

    def expand(self, node: Node) -> Node:
        """Append what `node` needs, and itself (ggml_build_forward_expand)."""
        if not node.seen:
            node.seen = True
            for source in node.src:
                if not source.seen:
                    self.expand(source)
            (self.leaves if node.op == "none" else self.nodes).append(node)
        return node
