"""What mgpu asks of a runtime's adapter. Adapters are pure: texts and types in, types out.

`launch` runs a runtime's own `--help` and hands the text in; files that a runtime needs go out in `Command`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

from msgspec import Struct
from msgspec.structs import replace

from mgpu.model import Format, Model
from mgpu.plan import DeviceBytes, HostBytes, Layout, Mode, Shape
from mgpu.request import Request, RuntimeName
from mgpu.rig import Gpu, Rig
from mgpu.service import Attachment, Service

#: A plan that is off by more than this share of what a device holds is said.
TOLERANCE: Final = 0.02

#: Tokens in the cache while generating where no context was asked for: half of a conversation of a thousand tokens.
#: Of a context that was asked for, half is taken to be in use.
TYPICAL_DEPTH: Final = 512


class Folder(Struct, frozen=True, kw_only=True):
    """A runtime that is a folder of source, as git clones it, and no program. Paths are relative, but for `places`.

    `wanted`: of several such folders, the one that has this is taken. `texts`: patterns of what `installed` looks at:
    it finds each file in `Probe.outputs` by its path, as text; what is no text (a folder, a program) as "".
    """

    places: tuple[str, ...]  # where people keep it: "~/tabbyAPI"
    program: str  # the file that makes it one: "main.py"
    wanted: str
    texts: tuple[str, ...]


class Search(Struct, frozen=True, kw_only=True):
    """Where `launch` looks for a runtime: an environment variable, names on PATH, files inside known PyPI packages.

    `distributions`: PyPI packages whose program it is, the best first. Their metadata beside it tell the version, and
    `Probe.outputs["--version"]` is that ("vllm 0.32.0"): for programs that take long to say it themselves.
    `live`: what the probes print depends on more than the program (a daemon), and on success or not: asked each time,
    and read whatever the exit status.
    `folder`: the variable names one, or several as in PATH; `executables` is then what people call it.
    """

    variable: str
    executables: tuple[str, ...]
    package_files: tuple[str, ...]  # relative to a site-packages directory
    install: str  # the command that installs it
    distributions: tuple[str, ...] = ()
    live: bool = False
    folder: Folder | None = None

    @property
    def looked(self) -> str:
        """Where it was looked for, as the end of a sentence that says it was not found."""
        if self.folder is not None:
            return f"in ${self.variable} or {', '.join(self.folder.places)}"
        return f"on PATH, in ${self.variable} or as a Python package"


class Probe(Struct, frozen=True, kw_only=True):
    """A runtime that was found, and what it printed: `outputs["--help"]`. `origin` says where it was found.

    `url`: the base URL of a service that answered; `outputs` then holds its answers, too, by path. Where only the
    service was found, it is the `executable`, too.
    """

    executable: str
    origin: str
    outputs: Mapping[str, str]
    url: str = ""


class ListedDevice(Struct, frozen=True, kw_only=True):
    """A device as the runtime itself names it. Sizes as it prints them (whole MiB), in bytes."""

    device: str  # "CUDA0", "Vulkan1", "MTL0"
    description: str
    total_bytes: int
    free_bytes: int


class Installed(Struct, frozen=True, kw_only=True):
    """A runtime as it can be used: its flags and devices. `devices` is None when it was not asked.

    `url`: the base URL of a service that runs already, and may be used. `cpu_build`: it uses no card at all.
    """

    runtime: RuntimeName
    executable: str
    origin: str
    version: str
    flags: frozenset[str]
    devices: tuple[ListedDevice, ...] | None = None
    url: str = ""
    cpu_build: bool = False


class Abilities(Struct, frozen=True, kw_only=True):
    """What a runtime can do with several cards, whatever the rig: a row of `mgpu runtimes`.

    `modes`: how cards can share the work, replicas among them where mgpu can start one on each card. `mixed`: those of
    `modes` that are open to cards of different memory. `cpu`: layers, or all of them, can stay on the CPU. `machines`:
    it places by itself, over other machines too. `note`: what else a person should know, in a few words.
    """

    modes: tuple[Mode, ...]
    mixed: tuple[Mode, ...] = ()
    cpu: bool = False
    machines: bool = False
    note: str = ""


class Here(Struct, frozen=True, kw_only=True):
    """What a runtime can do on one rig: the cards it can use (rig indices), how they can share, and why not more."""

    gpus: tuple[int, ...]
    modes: tuple[Mode, ...]
    why_not: tuple[str, ...] = ()


class Endpoint(Struct, frozen=True, kw_only=True):
    """Where the runtime is to listen. `port` is a real one, never 0."""

    host: str
    port: int
    api_key: str | None = None


class Command(Struct, frozen=True, kw_only=True):
    """What to start. `env` is set on top of the caller's environment, from which `scrub` prefixes are removed first.

    `watch_argv` is added when mgpu itself launches and reads the log; a person who pastes the command need not see it.
    `name`: what errors call it, where that is not the name of its program.
    `files`: paths to texts. Those with relative paths go into a new private directory, in which the runtime starts.
    `attachment`: what is then made ready on it, once `ready_url` answers; until then it has no model.
    `then`: the same for a person, as lines of shell.
    `fingerprint`: a regular expression for the `system_fingerprint` of its answers, where they have one: it tells how
    the model is split. `leaves`: file names (patterns) of its shared memory, which a killed runtime leaves behind.
    `after`: run when the process was ended or killed. `elsewhere`: what listens is no child of it, but in a container.
    `metrics_url`: where it tells what `Adapter.read_metrics` reads; empty: nowhere.
    """

    argv: tuple[str, ...]
    watch_argv: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()  # the runtime's names of the plan's devices, in order
    env: Mapping[str, str]
    scrub: tuple[str, ...]
    files: Mapping[str, str]
    chat: bool = True  # the model has a chat template; without, it continues a text
    ready_url: str
    endpoint: str  # the base URL for OpenAI-compatible clients
    attachment: Attachment | None = None
    then: tuple[str, ...] = ()
    name: str = ""
    fingerprint: str = ""
    leaves: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    elsewhere: bool = False
    metrics_url: str = ""


class Stage(Struct, frozen=True, kw_only=True):
    """The runtime said that it has come this far."""

    text: str


class Buffer(Struct, frozen=True, kw_only=True):
    """The runtime said that it allocated this. `kind` is weights, kv, compute or output."""

    device: str
    kind: str
    n_bytes: int


class Cause(Struct, frozen=True, kw_only=True):
    """The runtime said why it fails, in words we know; `hint` is what to do.

    `port_taken`: another program has its port. Where it goes on without, nobody would find it: it is to be stopped.
    `out_of_memory`: a device (or the host) was too small for the plan; `devices`: which, by the names it may have in
    `Command.devices` ("CPU" is the host), and `wanted_bytes`: how much it asked for in vain, where it says so.
    """

    text: str
    hint: str
    port_taken: bool = False
    out_of_memory: bool = False
    devices: tuple[str, ...] = ()
    wanted_bytes: int = 0

    def with_more(self, later: Cause) -> Cause:
        """What is known after a `later` line of the same failure: one may have the size, the next the device."""
        if not (self.out_of_memory and later.out_of_memory and later.devices):
            return self
        if self.devices and not set(later.devices) < set(self.devices):
            return self
        return replace(later, wanted_bytes=later.wanted_bytes or self.wanted_bytes)


class Left(Struct, frozen=True, kw_only=True):
    """The runtime said that it made these files, which it may leave behind: paths, whose last part may end in `*`."""

    paths: tuple[str, ...]


class Served(Struct, frozen=True, kw_only=True):
    """The runtime said that it has answered a request: tokens generated, in so many seconds."""

    n_tokens: int
    seconds: float


LogFact = Stage | Buffer | Cause | Left | Served


class Stats(Struct, frozen=True, kw_only=True):
    """What a runtime's metrics say, since its start. None: it does not say.

    `running`: requests being answered now; `waiting`: those in its queue. `generated`: tokens, all requests together;
    `generating_s`: the seconds that took, where they are counted as if requests came one after the other.
    """

    running: int | None = None
    waiting: int | None = None
    generated: int | None = None
    generating_s: float | None = None


class Pinned(Struct, frozen=True, kw_only=True):
    """Placement decisions that were taken by flags after `--`. None: mgpu decides."""

    tensor_split: tuple[float, ...] | None = None  # over the cards considered, in their order
    host_layers: int | None = None
    host_experts: int | None = None
    single: bool = False  # one device, whatever the rig has
    mode: Mode | None = None  # pipeline or tensor, whatever is faster


class Work(Struct, frozen=True, kw_only=True):
    """What one token takes, as prefix sums over the units: units i … j-1 read `weights[j] - weights[i]` bytes.

    `unpack`: bytes that slowly unpacked types are worth in addition. `cache`: bytes of cache and state, for `depth`
    tokens of one user. `heads`: attention heads times the tokens they look back at. `layers`: blocks, in plain
    transformer blocks' worth of kernels; `recurrent` and `routed`: how many of them recur, and route to experts.
    `flops`: of the matrices, for one token. `model` and `kv_type`: to find what was measured.
    """

    runtime: RuntimeName
    model: Model
    kv_type: str
    users: int
    ctx: int  # per user
    depth: int
    weights: tuple[float, ...]  # all but routed experts
    experts: tuple[float, ...]  # routed experts that work on the token
    unpack: tuple[float, ...]
    cache: tuple[float, ...]
    heads: tuple[float, ...]
    layers: tuple[float, ...]
    recurrent: tuple[float, ...]
    routed: tuple[float, ...]
    flops: tuple[float, ...]
    head_dim: int  # attention takes four operations for each of these, head and token
    build: int | None = None  # the runtime's build number, where it is installed and known
    host_experts: int = 0  # the first blocks whose experts the host keeps whatever the layout says
    cache_on_host: bool = False

    @property
    def n_units(self) -> int:
        return len(self.weights) - 1


class Job(Protocol):
    """One model asked of one runtime: what it would take, and the command that starts it. Immutable.

    As with `Adapter`, one that derives from this need not write what has an answer here already.
    """

    @property
    def runtime(self) -> RuntimeName: ...
    @property
    def ctx(self) -> int:
        """Tokens of context per user."""
        ...

    @property
    def ctx_train(self) -> int:
        """The context the model was trained for."""
        ...

    @property
    def ctx_step(self) -> int:
        """The runtime rounds contexts up to a multiple of this."""
        ...

    @property
    def users(self) -> int: ...
    @property
    def has_experts(self) -> bool:
        """Whether routed experts can be kept on the host apart from their layers."""
        return False

    @property
    def computes_on_cpu(self) -> bool:
        """Whether the runtime can leave layers, or all of them, to the CPU."""
        ...

    @property
    def tensor_is_experimental(self) -> bool:
        """Whether the runtime itself calls its tensor mode experimental."""
        return False

    def why_not_tensor(self, gpus: tuple[Gpu, ...]) -> str | None:
        """What keeps the runtime from running this model as tensor ranks on `gpus`, in a few words; None: nothing."""
        del gpus
        return f"{self.runtime} has no tensor ranks"

    @property
    def kv_type(self) -> str: ...
    @property
    def n_units(self) -> int:
        """What the runtime hands out: blocks, and the output layer as the last unit."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the person asked of the runtime that costs or contradicts something."""
        return ()

    @property
    def pinned(self) -> Pinned:
        """What flags after `--` decide in mgpu's place."""
        return Pinned()

    def counts(self, tensor_split: tuple[float, ...], host_layers: int) -> tuple[int, ...]:
        """The units each device gets when the runtime is given these proportions."""
        ...

    def device(self, span: range, shape: Shape, gpu: Gpu) -> DeviceBytes:
        """Bytes on `gpu` when it holds the units of `span` (non-empty, contiguous)."""
        ...

    def stored(self, span: range, shape: Shape, gpu: Gpu) -> int:
        """Of `device`, weights and cache alone: the larger part, and cheap to ask."""
        ...

    def host(self, shape: Shape, gpus: tuple[Gpu, ...]) -> HostBytes:
        """Bytes on the host beside those devices."""
        ...

    @property
    def work(self) -> Work:
        """What a token takes, unit by unit: all that a speed depends on beside the cards."""
        ...

    def at_ctx(self, ctx: int) -> Job:
        """The same job with another context per user."""
        ...

    def at_users(self, users: int) -> Job:
        """The same job for another number of users; as it is where flags after `--` fix their number."""
        ...

    def at_kv_type(self, kv_type: str) -> Job:
        """The same job with another KV-cache type; raises `UsageError` where the model or runtime cannot."""
        ...

    def command(self, layout: Layout, rig: Rig, endpoint: Endpoint) -> Command:
        """What starts the runtime; with an `attachment`, what a person would type in its place: `sh -c 'curl …'`."""
        ...

    def attachment(self, layout: Layout, rig: Rig) -> Attachment | None:
        """How to use a service that runs already; None where `command` starts the runtime."""
        del layout, rig
        return None


class Projected(Struct, frozen=True, kw_only=True):
    """What the runtime's own tool says one device would hold, in bytes: whole MiB, rounded down, as it prints them."""

    device: str
    weights: int
    kv: int
    compute: int


class Expected(Struct, frozen=True, kw_only=True):
    """The plan's answer to the question the tool is asked. `compute` may be up to `compute_more` bytes larger there."""

    device: str
    weights: int
    kv: int
    compute: int
    compute_more: int = 0


class Question(Struct, frozen=True, kw_only=True):
    """What the tool is asked. `expected`: the plan's devices in order, then the host.

    `remarks`: in which ways the tool's figures are known to differ from what the runtime will allocate.
    """

    arguments: tuple[str, ...]
    expected: tuple[Expected, ...]
    remarks: tuple[str, ...]


class Projection(Struct, frozen=True, kw_only=True):
    """What was asked of which tool, and its answer."""

    tool: str
    question: Question
    projected: tuple[Projected, ...]


class Projector(Protocol):
    """A runtime's own tool that tells what it would allocate, and allocates nothing."""

    @property
    def search(self) -> Search: ...
    def question(self, job: Job, layout: Layout, rig: Rig, command: Command, help_text: str) -> Question:
        """`help_text`: what the tool prints for `--help`. Raises `RuntimeMissingError` for a tool that is too old."""
        ...

    def read(self, text: str) -> tuple[Projected, ...]:
        """The tool's standard output; empty when it holds no projection."""
        ...


class Adapter(Protocol):
    """One runtime. An adapter that derives from this need not write what has an answer here already."""

    @property
    def name(self) -> RuntimeName: ...
    @property
    def formats(self) -> frozenset[Format]: ...
    @property
    def search(self) -> Search: ...
    @property
    def probes(self) -> tuple[str, ...]:
        """The flags whose output `installed` reads: "--version", "--help"."""
        ...

    @property
    def device_probe(self) -> str | None:
        """The flag that lists devices (it may open them, so it is asked only when needed)."""
        return None

    @property
    def service(self) -> Service | None:
        """Where the runtime is asked for, if it is one that people leave running."""
        return None

    @property
    def abilities(self) -> Abilities: ...
    def why_not_gpu(self, gpu: Gpu) -> str | None:
        """What keeps the runtime from using this card at all, in a few words with the figures; None: nothing."""
        del gpu
        return None

    @property
    def projector(self) -> Projector | None:
        """What `plan --verify` asks, where the runtime has such a tool."""
        return None

    def installed(self, probe: Probe) -> Installed:
        """Raises `RuntimeMissingError` when the runtime is too old to be driven."""
        ...

    def assumed(self) -> Installed:
        """The newest version known, for plans that need no runtime on this machine."""
        ...

    def read_devices(self, text: str) -> tuple[ListedDevice, ...]:
        """The output of `device_probe`."""
        del text
        return ()

    def bind(self, rig: Rig, listed: tuple[ListedDevice, ...]) -> Rig:
        """`rig` with the cards as this build of the runtime can use them; those it cannot are disabled, and said."""
        del listed
        return rig

    def job(self, model: Model, request: Request, installed: Installed) -> Job:
        """Raises `UsageError` for flags after `--` that have no meaning, `BadModelError` for what it cannot load."""
        ...

    def read_log(self, line: str) -> LogFact | None:
        """What one line of the runtime's log says, or None."""
        del line
        return None

    def read_metrics(self, text: str) -> Stats | None:
        """What `Command.metrics_url` answered; None where that is nothing this runtime would say."""
        del text
        return None
