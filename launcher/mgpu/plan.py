"""The decision and its parts: which cards, which layers on each, how fast, and why. Types only."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from mgpu.request import RuntimeName

PlacementKind = Literal["single", "pipeline", "tensor", "offload", "cpu", "replicas", "attach"]
Mode = Literal["pipeline", "tensor", "replicas"]
Verdict = Literal["applies", "passes", "warns", "refuses"]


class Shape(Struct, frozen=True, kw_only=True):
    """What all devices of a layout share, and what each one's memory depends on beside its own layers.

    A runtime hands out *units*: the blocks 0 … n_layer-1 and, as the last unit, the output layer.
    """

    n_devices: int
    mode: Mode = "pipeline"
    host_layers: int = 0  # the first blocks, kept on the host
    host_experts: int = 0  # the first blocks whose routed experts alone are kept on the host


class Layout(Struct, frozen=True, kw_only=True):
    """Units to devices. `gpus` are rig indices in the order the runtime numbers them; `counts` are units on each.

    As a pipeline (one device, too), the first `shape.host_layers` units are on the host; then `counts[0]` units on
    `gpus[0]`, and so on: `host_layers + sum(counts)` is the number of units, or `counts` is empty (all on the host).
    As tensor ranks and as replicas, each device takes part in every unit, and each count is the number of units.
    A replica is a runtime of its own: its memory is that of a shape with one device.
    """

    gpus: tuple[int, ...]
    counts: tuple[int, ...]
    shape: Shape

    def spans(self) -> tuple[range, ...]:
        """The units on each device, as ranges."""
        if self.shape.mode != "pipeline":
            return tuple(range(count) for count in self.counts)
        spans: list[range] = []
        start = self.shape.host_layers
        for count in self.counts:
            spans.append(range(start, start + count))
            start += count
        return tuple(spans)


class DeviceBytes(Struct, frozen=True, kw_only=True):
    """What one device must hold. `overhead` is outside of the runtime's own buffers: driver context, pools, margin."""

    weights: int
    kv: int
    compute: int
    overhead: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute + self.overhead


class HostBytes(Struct, frozen=True, kw_only=True):
    """What the host must hold. `weights` includes what stays there by design (token embedding) and repacked layers."""

    weights: int
    kv: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute


class DevicePlan(Struct, frozen=True, kw_only=True):
    """One device of the plan. `blocks` are block numbers; the output layer is `has_output`."""

    gpu: int
    name: str
    uuid: str | None
    blocks: range
    has_output: bool
    memory: DeviceBytes
    free_bytes: int
    reserve_bytes: int

    @property
    def spare_bytes(self) -> int:
        """What stays free beyond the reserve; negative when it does not fit."""
        return self.free_bytes - self.reserve_bytes - self.memory.total


class HostPlan(Struct, frozen=True, kw_only=True):
    """The host's share. `blocks` are whole blocks computed by the CPU; `expert_blocks` only their routed experts."""

    blocks: range
    expert_blocks: range
    memory: HostBytes
    free_bytes: int


class Speed(Struct, frozen=True, kw_only=True):
    """Generated tokens per second for one user. A prediction unless `measured`."""

    expected: float
    low: float
    high: float
    measured: bool = False

    @property
    def digits(self) -> int:
        """Decimals that matter."""
        return 0 if self.expected >= 10 else 1 if self.expected >= 0.5 else 2

    @property
    def words(self) -> str:
        """`"95-128 tok/s predicted"`; with a decimal where it matters. Never one bare number."""
        how = "measured" if self.measured else "predicted"
        return f"{self.low:.{self.digits}f}-{self.high:.{self.digits}f} tok/s {how}"


class Wait(Struct, frozen=True, kw_only=True):
    """Seconds from the request to the first token, for a prompt of `prompt_tokens`. A prediction."""

    prompt_tokens: int
    expected: float
    low: float
    high: float


class Forecast(Struct, frozen=True, kw_only=True):
    """How fast a placement is. `tok_s`: one user alone; `total_tok_s`: all users at once, together."""

    tok_s: Speed | None = None
    prompt_tok_s: Speed | None = None
    first_token: Wait | None = None
    total_tok_s: Speed | None = None  # None for one user


class RuleVerdict(Struct, frozen=True, kw_only=True):
    """What one rule said, with the figures it used in the text. `source`: where rule and figures come from.

    `quiet`: the rule has nothing to do with this plan; the text says why.
    """

    id: str
    verdict: Verdict
    text: str
    source: str
    quiet: bool = False


class Alternative(Struct, frozen=True, kw_only=True):
    """Another placement that was considered, and why it was not chosen. `short_bytes`: 0 when it fits.

    `unasked`: what the runtime does when it is left to itself.
    """

    runtime: RuntimeName
    placement: PlacementKind
    gpus: tuple[int, ...]
    fits: bool
    short_bytes: int
    tok_s: Speed | None
    total_tok_s: Speed | None = None  # for all users together; None for one
    why_not: str
    unasked: bool = False


class Refusal(Struct, frozen=True, kw_only=True):
    """Why there is nothing to launch. `code` and `exit_code` as in `mgpu.errors`; `rule`: the one that refuses."""

    code: str
    exit_code: int
    message: str
    hint: str
    rule: str | None = None


class Plan(Struct, frozen=True, kw_only=True):
    """The decision. With a `refusal`, the rest is the closest plan there was."""

    placement: PlacementKind
    runtime: RuntimeName
    ctx: int  # tokens per user
    users: int
    kv_type: str
    layout: Layout
    devices: tuple[DevicePlan, ...]
    host: HostPlan
    tensor_split: tuple[int, ...] | None
    forecast: Forecast
    rules: tuple[RuleVerdict, ...]
    alternatives: tuple[Alternative, ...] = ()
    warnings: tuple[str, ...] = ()
    ctx_fits: int | None = None  # the largest context per user these same devices would hold
    users_each: int = 1  # users of one replica; all of them where there are no replicas
    changes: tuple[str, ...] = ()  # what would change the answer, one line each
    attached: str = ""  # of placement "attach": the service and its machines, in words
    refusal: Refusal | None = None

    @property
    def tok_s(self) -> Speed | None:
        """Tokens per second for one user alone."""
        return self.forecast.tok_s
