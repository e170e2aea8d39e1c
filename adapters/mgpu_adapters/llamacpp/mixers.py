"""Blocks that keep a recurrent state: Mamba, Mamba-2 and short convolutions.

Source: llama.cpp b11434, src/llama-graph.cpp (build_rs), src/models/mamba-base.cpp, src/models/lfm2.cpp;
ggml/src/ggml.c for the size of SSM_SCAN.
"""

from __future__ import annotations

from collections.abc import Callable

from mgpu_adapters.llamacpp.blocks import Build, strided
from mgpu_adapters.llamacpp.graph import Node, glu, like, reshape, tensor, view

Reader = Callable[[Node, Node], Node]


def read_state(b: Build, state: Node, reader: Reader | None = None) -> Node:
    """The states of this batch's sequences: gathered, or (`reader`) read in place by the operation itself."""
    size, n_seqs = state.ne[0], b.n_seqs
    states = reshape(state, size, n_seqs)
    b.graph.expand(Node("scale", (0, 1, 1, 1), 0, (view(states, (0, 1, 1, 1)),), states))
    gathered = b.state_rows if reader is None else b.other_state_rows
    rows = tensor("get_rows", (size, gathered.ne[0], 1, 1), states, gathered)
    out = view(rows, (size, n_seqs, 1, 1)) if reader is None else reader(states, b.main_state_rows)
    b.graph.expand(out)
    write_state(b, state, view(rows, (size, 0, 1, 1)))
    return out


def write_state(b: Build, state: Node, rows: Node) -> None:
    target = view(state, rows.ne)
    b.graph.expand(Node("cpy", rows.ne, rows.n_bytes, (rows, target), state))


def last_columns(b: Build, il: int, width: int, channels: int) -> Node:
    """What a convolution over `width` tokens keeps of the batch before."""
    return reshape(read_state(b, b.state(il, "r", b.anatomy.caches[il].state_r)), width - 1, channels, b.n_seqs)


def joined(b: Build, il: int, last: Node, part: Node) -> Node:
    """`part` (channels, tokens, sequences) turned and put behind `last`; its own last columns are kept."""
    channels, per_seq = part.ne[0], part.ne[1]
    turned = Node("transpose", (per_seq, channels, b.n_seqs, 1), part.n_bytes, (part,), part)
    out = tensor("concat", (last.ne[0] + per_seq, channels, b.n_seqs, 1), last, turned)
    kept = strided(out, last.ne[0], channels, b.n_seqs)
    write_state(b, b.state(il, "r", b.anatomy.caches[il].state_r), kept)
    return out


def convolved(b: Build, il: int, columns: Node, per_seq: int, name: str) -> Node:
    kernel = b.weight(il, name + ".weight")
    sources = (columns,) if kernel is None else (columns, kernel)
    return tensor("ssm_conv", (columns.ne[1], per_seq, b.n_seqs, 1), *sources)


def selective_scan(b: Build, il: int, heads: Node, rates: tuple[Node, Node, Node]) -> Node:
    """The scan's outputs, and behind them the new states. `rates`: dt, B and C."""
    dt, in_, out_ = rates
    a = b.weight(il, "ssm_a")
    size = b.anatomy.caches[il].state_s
    state = b.state(il, "s", size)
    elements = heads.ne[0] * heads.ne[1] * heads.ne[2] * heads.ne[3]

    def read(states: Node, ids: Node) -> Node:
        sources = (states, heads, dt, *(() if a is None else (a,)), in_, out_, ids)
        return tensor("ssm_scan", (elements + size * b.n_seqs, 1, 1, 1), *sources)

    scan = read_state(b, state, read)
    write_state(b, state, view(scan, (size, b.n_seqs, 1, 1)))
    return scan


def mamba2(b: Build, il: int, x: Node) -> Node:
    keys, n_seqs, per_seq = b.keys, b.n_seqs, b.n_tokens // b.n_seqs
    inner, size, groups = keys.number("ssm.inner_size"), keys.number("ssm.state_size"), keys.number("ssm.group_count")
    n_head = keys.number("ssm.time_step_rank") or 1
    dim, channels = inner // n_head, inner + 2 * groups * size
    last = last_columns(b, il, keys.number("ssm.conv_kernel"), channels)
    mixed = b.project(il, "ssm_in", x)
    mixed = reshape(mixed, mixed.ne[0], per_seq, n_seqs)
    z = strided(mixed, dim, n_head, per_seq, n_seqs)
    dt = strided(mixed, n_head, per_seq, n_seqs)
    columns = joined(b, il, last, strided(mixed, channels, per_seq, n_seqs))
    xbc = b.scaled(convolved(b, il, columns, per_seq, "ssm_conv1d"), None, b.weight(il, "ssm_conv1d.bias"))
    xbc = like("unary", xbc)
    heads = strided(xbc, dim, n_head, per_seq, n_seqs)
    in_, out_ = (strided(xbc, size, groups, per_seq, n_seqs) for _ in range(2))
    dt = b.scaled(tensor("cont", dt.ne, dt), None, b.weight(il, "ssm_dt.bias"))
    y = view(selective_scan(b, il, heads, (dt, in_, out_)), (dim, n_head, per_seq, n_seqs))
    y = gated(b, il, y, heads, z)
    if b.has(il, "ssm_norm.weight"):
        y = b.norm(reshape(y, inner // max(groups, 1), max(groups, 1), per_seq, n_seqs), il, "ssm_norm", "rms_norm")
    return b.project(il, "ssm_out", reshape(y, inner, per_seq * n_seqs))


def gated(b: Build, il: int, y: Node, x: Node, z: Node) -> Node:
    """The scan's output with what passed by it, gated by `z`."""
    d = b.weight(il, "ssm_d")
    y = like("add", y, x if d is None else like("mul", x, d))
    return glu(tensor("cont", z.ne, z), y)


def mamba(b: Build, il: int, x: Node) -> Node:
    keys, n_seqs, per_seq = b.keys, b.n_seqs, b.n_tokens // b.n_seqs
    inner, size, rank = keys.number("ssm.inner_size"), keys.number("ssm.state_size"), keys.number("ssm.time_step_rank")
    last = last_columns(b, il, keys.number("ssm.conv_kernel"), inner)
    mixed = b.project(il, "ssm_in", reshape(x, x.ne[0], per_seq, n_seqs))
    part, z = (strided(mixed, inner, per_seq, n_seqs) for _ in range(2))
    columns = joined(b, il, last, part)
    wide = b.scaled(convolved(b, il, columns, per_seq, "ssm_conv1d"), None, b.weight(il, "ssm_conv1d.bias"))
    wide = like("unary", wide)
    rates = b.project(il, "ssm_x", wide)
    dt = strided(rates, rank, per_seq, n_seqs)
    in_, out_ = (strided(rates, size, 1, per_seq, n_seqs) for _ in range(2))
    if b.has(il, "ssm_dt_norm.weight"):
        dt = b.norm(dt, il, "ssm_dt_norm", "rms_norm")
        in_, out_ = b.norm(in_, il, "ssm_b_norm", "rms_norm"), b.norm(out_, il, "ssm_c_norm", "rms_norm")
    else:
        dt = tensor("cont", dt.ne, dt)
    dt = b.project(il, "ssm_dt", dt)
    scan = selective_scan(b, il, reshape(wide, 1, inner, per_seq, n_seqs), (dt, in_, out_))
    y = gated(b, il, view(scan, (inner, per_seq, n_seqs, 1)), wide, z)
    y = b.project(il, "ssm_out", y)
    return reshape(y, y.ne[0], per_seq * n_seqs)


def short_convolution(b: Build, il: int, x: Node) -> Node:
    """LFM2's: gated before and after."""
    n_embd, n_seqs, per_seq = x.ne[0], b.n_seqs, b.n_tokens // b.n_seqs
    mixed = b.project(il, "shortconv.in_proj", reshape(x, n_embd, per_seq, n_seqs))
    before, after, part = (strided(mixed, n_embd, per_seq, n_seqs) for _ in range(3))
    product = like("mul", before, part)
    last = last_columns(b, il, b.keys.number("shortconv.l_cache", 3), n_embd)
    out = convolved(b, il, joined(b, il, last, product), per_seq, "shortconv.conv")
    y = b.project(il, "shortconv.out_proj", like("mul", after, out))
    return reshape(y, y.ne[0], per_seq * n_seqs)
