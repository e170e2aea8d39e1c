"""ggml's scheduler and graph allocator: which backend runs what, what is copied, and the memory that takes on each.

A simulation of the real thing on shapes alone. Source: llama.cpp b11434, ggml/src/ggml-backend.cpp
(ggml_backend_sched_split_graph), ggml/src/ggml-alloc.c (ggml_gallocr_alloc_graph_impl, ggml_dyn_tallocr_*).
Backends are numbered as in llama.cpp: the devices from 0, the CPU last.
"""

from __future__ import annotations

from typing import Final

from mgpu_adapters.llamacpp.graph import Graph, Node

#: Backends with op offload take on the work of weights in host memory from this many tokens on (ggml-cuda.cu).
OFFLOAD_MIN_BATCH: Final = 32

_VIEWS: Final = frozenset({"view", "reshape", "permute", "transpose"})
_IN_PLACE: Final = frozenset({
    "fill", "scale", "add", "add_id", "add1", "sub", "mul", "div", "sqr", "sqrt", "log", "unary", "rope", "rms_norm",
    "clamp", "soft_max",
})  # fmt: skip
_ENDLESS: Final = 1 << 60


#: Head sizes CUDA's flash attention has kernels for (ggml-cuda/fattn.cu, ggml_cuda_get_best_fattn_kernel).
_CUDA_HEADS: Final = frozenset({40, 64, 72, 80, 96, 112, 128, 256, 512})
_CUDA_UNEQUAL_HEADS: Final = frozenset({(192, 128), (320, 256), (576, 512)})


def can_attend(dim_k: int, dim_v: int) -> bool:
    """Whether CUDA's flash attention takes heads of this size; else it runs on the CPU (or `-fa auto` does without)."""
    return dim_k in _CUDA_HEADS if dim_k == dim_v else (dim_k, dim_v) in _CUDA_UNEQUAL_HEADS


class Backend:
    """One backend's memory: a best-fit allocator that knows how far it ever reached."""

    def __init__(self, alignment: int, *, cuda: bool = False, offloads: bool = False) -> None:
        self.alignment = alignment
        self.cuda = cuda
        self.offloads = offloads
        self.peak = 0
        self._free = [[0, _ENDLESS]]  # [offset, size], by offset; the last one is the end of the buffer

    def runs(self, node: Node) -> bool:
        """Whether this backend has a kernel for `node`."""
        return not self.cuda or node.op != "flash_attn" or can_attend(node.src[1].ne[0], node.ne[0])

    def size(self, node: Node) -> int:
        n_bytes = node.n_bytes
        if self.cuda:
            n_bytes += node.extra
        return -(-n_bytes // self.alignment) * self.alignment

    def allocate(self, size: int) -> int:
        """Offset of the tightest free block; of equal ones, the last; the end of the buffer only when none fits."""
        free = self._free
        best, best_size = len(free) - 1, _ENDLESS
        for i in range(len(free) - 1):
            if size <= free[i][1] <= best_size:
                best, best_size = i, free[i][1]
        block = free[best]
        offset = block[0]
        block[0] += size
        block[1] -= size
        if not block[1]:
            del free[best]
        self.peak = max(self.peak, offset + size)
        return offset

    def release(self, offset: int, size: int) -> None:
        free = self._free
        end = offset + size
        for i, block in enumerate(free):
            if block[0] + block[1] == offset:
                block[1] += size
                if i + 1 < len(free) and free[i + 1][0] == offset + size:
                    block[1] += free[i + 1][1]
                    del free[i + 1]
                return
            if block[0] == end:
                block[0] = offset
                block[1] += size
                return
            if block[0] > end:
                free.insert(i, [offset, size])
                return
        free.append([offset, size])


def reserve(graph: Graph, backends: list[Backend], n_copies: int = 1) -> list[int]:
    """Bytes each backend's compute buffer takes for `graph`. Nodes pinned to a backend have it set beforehand."""
    _assign(graph, backends)
    plan = _Plan(graph, n_copies)
    _allocate(plan, backends)
    return [backend.peak for backend in backends]


def _assign(graph: Graph, backends: list[Backend]) -> None:
    """Passes 1 to 4: a backend for each node and leaf."""
    cpu = len(backends) - 1
    offload = next((i for i in range(cpu) if backends[i].offloads), -1)
    for leaf in graph.leaves:
        leaf.backend = _from_memory(leaf, cpu)
    for node in graph.nodes:
        if node.backend < 0:
            node.backend = _from_weights(node, cpu, offload)
    works = [node for node in graph.nodes if node.op not in _VIEWS]
    for stop_at in (cpu, -1):
        _spread(works, backends, stop_at)
        _spread(works[::-1], backends, stop_at)
    for node in works:
        if node.backend < 0 and not backends[0].runs(node):
            node.backend = cpu
    for node in graph.nodes:
        _settle_sources(node)


def _settle_sources(node: Node) -> None:
    """Pass 4: views go with what they look at; what nobody has claimed goes with its first user."""
    if node.backend < 0 and node.view is not None:
        node.backend = node.view.backend
    for source in node.src:
        if source.backend < 0:
            source.backend = node.backend if source.view is None else source.view.backend
    node.backend = max(node.backend, 0)


def _from_memory(node: Node, cpu: int) -> int:
    root = node if node.view is None else node.view
    if root.home is not None:
        return root.home
    return cpu if node.is_input else -1


def _from_weights(node: Node, cpu: int, offload: int) -> int:
    backend = _from_memory(node, cpu)
    if backend >= 0 or node.op in ("rope", "flash_attn"):
        return backend
    for source in node.src:
        if source.is_weight:
            home = source.home
            if home is None:
                continue
            if home == cpu and offload >= 0 and _worth_offloading(node):
                return offload
            return home
    return -1


def _worth_offloading(node: Node) -> bool:
    if node.op == "get_rows":
        return False
    tokens = node.ne[2] if node.op == "mul_mat_id" else node.ne[1] if node.op == "mul_mat" else node.ne[1] * node.ne[2]
    return tokens >= OFFLOAD_MIN_BATCH


def _spread(works: list[Node], backends: list[Backend], stop_at: int) -> None:
    """Unassigned nodes join the node before; nothing joins backend `stop_at`."""
    current = -1
    for node in works:
        if node.backend >= 0:
            current = -1 if node.backend == stop_at else node.backend
        elif current >= 0 and (node.op != "flash_attn" or backends[current].runs(node)):
            node.backend = current


class _Plan:
    """Pass 5 and after: the graph with its copies between backends, in allocation order."""

    def __init__(self, graph: Graph, n_copies: int) -> None:
        self.nodes: list[tuple[Node, int]] = []
        self.leaves: list[tuple[Node, int]] = []
        self._n_copies = n_copies
        self._copies: dict[tuple[int, int], list[Node]] = {}
        self._split_inputs: list[tuple[Node, int]] = []
        self._cut(graph)
        if n_copies > 1:
            self._keep_inputs(graph)
        self.leaves.extend((leaf, leaf.backend) for leaf in graph.leaves)

    def _cut(self, graph: Graph) -> None:
        """Split where the backend changes; a split's inputs are copied when it begins."""
        split: list[tuple[Node, int]] = []
        inputs: list[Node] = []
        current = next((node.backend for node in graph.nodes if node.op not in _VIEWS), 0)
        for node in graph.nodes:
            if node.op not in _VIEWS:
                if node.backend != current or (inputs and _brings_weight(node, current)):
                    self._close(split, inputs, current)
                    split, inputs, current = [], [], node.backend
                self._copy_sources(node, current, inputs)
            split.append((node, node.backend))
        self._close(split, inputs, current)

    def _copy_sources(self, node: Node, current: int, inputs: list[Node]) -> None:
        sources = node.src
        for i, source in enumerate(sources):
            if source.backend == current or _lives_on(source, current):
                continue
            key = (id(source), current)
            copies = self._copies.get(key)
            if copies is None:
                copies = self._copies[key] = [_copy(source, kept=self._n_copies > 1) for _ in range(self._n_copies)]
                inputs.append(source)
            node.src = (*node.src[:i], copies[0], *node.src[i + 1 :])

    def _close(self, split: list[tuple[Node, int]], inputs: list[Node], backend: int) -> None:
        for source in inputs:
            dependency = Node("none", source.ne, source.n_bytes, (source,), source)
            self.nodes.append((dependency, source.backend))
            self.nodes.append((self._copies[id(source), backend][0], backend))
            self._split_inputs.append((source, backend))
        self.nodes.extend(split)

    def _keep_inputs(self, graph: Graph) -> None:
        """Pipelining: every input, and every copy, once for each batch in flight, from the start and for good."""
        for leaf in graph.leaves:
            if leaf.is_input:
                leaf.is_output = True
                self.leaves.append((leaf, leaf.backend))
                self.leaves.extend((_copy(leaf, kept=True), leaf.backend) for _ in range(self._n_copies - 1))
        for source, backend in self._split_inputs:
            self.leaves.extend((copy, backend) for copy in self._copies[id(source), backend])


def _lives_on(node: Node, backend: int) -> bool:
    root = node if node.view is None else node.view
    return root.home == backend


def _brings_weight(node: Node, current: int) -> bool:
    return any(source.is_weight and source.backend != current for source in node.src)


def _copy(source: Node, *, kept: bool) -> Node:
    copy = Node("none", source.ne, source.n_bytes)
    copy.extra = source.extra if source.is_weight else 0
    copy.is_input = copy.is_output = kept
    return copy


def _allocate(plan: _Plan, backends: list[Backend]) -> None:
    """Inputs first, then each node as its turn comes; what is done with is given back."""
    for leaf, backend in plan.leaves:
        if leaf.pending:
            _place(leaf, backend, backends)
    for node, backend in plan.nodes:
        _count(node, backend, backends)
    for node, backend in plan.nodes:
        for source in node.src:
            if source.pending:
                _place(source, backend, backends)
        if node.pending:
            _place(node, backend, backends)
        for source in node.src:
            source.n_children -= 1
            if not source.n_children and not source.n_views:
                _forget(source, backends)


def _count(node: Node, backend: int, backends: list[Backend]) -> None:
    """Who reads what, and inputs placed before anything can take their memory."""
    if node.view is not None and node.op != "none":
        node.view.n_views += 1
    for item in (node, *node.src):
        if item.is_input and item.pending:
            _place(item, backend, backends)
    for source in node.src:
        source.n_children += 1


def _place(node: Node, backend: int, backends: list[Backend]) -> None:
    """Give `node` memory: its source's, when it can overwrite that, else its own."""
    node.pending = False
    node.owned = True
    if node.op in _IN_PLACE:
        for parent in node.src:
            if parent.owned and not parent.is_output and _overwritable(node, parent):
                node.place, node.offset, node.size = parent.place, parent.offset, parent.size
                parent.owned = False
                return
    memory = backends[backend]
    node.place = backend
    node.size = memory.size(node)
    node.offset = memory.allocate(node.size)


def _overwritable(node: Node, parent: Node) -> bool:
    return parent.n_children == 1 and not parent.n_views and parent.ne == node.ne and parent.n_bytes == node.n_bytes


def _forget(node: Node, backends: list[Backend]) -> None:
    """Nothing reads `node` any more."""
    root = node
    if node.view is not None:
        root = node.view
        root.n_views -= 1
        if root.n_views or root.n_children:
            return
    if root.owned and not root.is_output:
        backends[root.place].release(root.offset, root.size)
        root.owned = False
