"""`mgpu plan --verify`, and the log of what launches took: a FAKE llama-fit-params, and the real one if there is."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Mgpu, write_program
from fakenvml.machine import Machine, rtx_3090
from mgpu.adapter import TOLERANCE, Buffer, Command, Endpoint, Expected, Projected, Projection, Question
from mgpu.decide.choose import choose
from mgpu.errors import RuntimeFailedError, RuntimeMissingError
from mgpu.launch.find import find_runtime
from mgpu.launch.projection import find_tool, project
from mgpu.launch.verify import KEPT, Launched, keep, measure
from mgpu.plan import Plan
from mgpu.report.verified import Row, rows, verified_object, warnings
from mgpu.request import Request
from mgpu.units import MIB
from mgpu_adapters.llamacpp.adapter import LlamaCpp
from mgpu_adapters.llamacpp.projection import FitParams
from oracle import gpu_of
from planning import read, rig_of

Header = Callable[[str], Path]

SMALL = "Llama-3.1-8B-Instruct-Q4_K_M"

#: llama-fit-params b11434, gemma-3-270m Q4_K_M, `-c 8192 -ngl 19 -sm layer -ts 10,9 -fa on --no-repack --fit-print on`
#: on two ggml-rpc-server, as printed.
RECORDED = "RPC0 35 17 68 \nRPC1 199 22 559 \nHost 170 0 48 \n"

#: Entries of its `--help` as b11434 prints them; the description of one names a flag that it does not know.
HELP = """\
----- common params -----
-h,    --help, --usage                  print usage and exit
-c,    --ctx-size N                     size of the prompt context (default: 0, 0 = loaded from model)
-b,    --batch-size N                   logical maximum batch size (default: 2048)
-ub,   --ubatch-size N                  physical maximum batch size (default: 512)
-fa,   --flash-attn [on|off|auto]       set Flash Attention use ('on', 'off', or 'auto', default: 'auto')
--repack, -nr, --no-repack              whether to enable weight repacking (default: enabled)
-ctk,  --cache-type-k TYPE              KV cache data type for K
-ctv,  --cache-type-v TYPE              KV cache data type for V
-np,   --parallel N                     number of parallel sequences to decode (default: 1)
--rpc SERVERS                           comma-separated list of RPC servers (host:port)
-dev,  --device <dev1,dev2,..>          comma-separated list of devices to use for offloading (none = don't
                                        offload); see --main-gpu
-ngl,  --gpu-layers, --n-gpu-layers N   max. number of layers to store in VRAM, either an exact number,
-sm,   --split-mode {none,layer,row,tensor}
-ts,   --tensor-split N0,N1,N2,...      fraction of the model to offload to each GPU, comma-separated list of
-fit,  --fit [on|off]                   whether to adjust unset arguments to fit in device memory ('on' or
-m,    --model FNAME                    model path to load
--temp, --temperature N                 temperature, as --jinja
----- example-specific params -----
-fitp, --fit-print [on|off]             print the estimated required memory ('on' or 'off', default: 'off')
"""

#: FAKE, for tests only: answers `--help`, writes down how it was called, then does as its file `answer` says.
TOOL = """\
import json, os, pathlib, sys
here = pathlib.Path(__file__).parent
if sys.argv[1:] == ["--help"]:
    print({help!r})
    sys.exit()
kept = {{name: os.environ[name] for name in os.environ if name.startswith(("CUDA", "LLAMA"))}}
(here / "asked.json").write_text(json.dumps({{"argv": sys.argv[1:], "env": kept}}))
exec((here / "answer").read_text())
"""


def _tool(directory: Path, answer: str, help_text: str = HELP) -> Path:
    (directory / "answer").write_text(answer)
    return write_program(directory / "llama-fit-params", TOOL.format(help=help_text))


def _decided(model: Path, devices: int, **asked: Any) -> tuple[Plan, Command, Callable[[str], Question]]:
    """A plan for so many remote devices with room for anything, its command, and the question it makes."""
    adapter, request = LlamaCpp(), Request(**asked)
    rig = rig_of(*(gpu_of("rpc", device) for device in range(devices)))
    job = adapter.job(read(str(model)), request, adapter.assumed())
    plan = choose(request, rig, job)
    job = job.at_ctx(plan.ctx)
    command = job.command(plan.layout, rig, Endpoint(host="127.0.0.1", port=8080))
    return plan, command, lambda text: FitParams().question(job, plan.layout, rig, command, text)


class TestReading:
    def test_recorded_output(self) -> None:
        read_back = [(item.device, item.weights, item.kv, item.compute) for item in FitParams().read(RECORDED)]
        assert read_back == [
            ("RPC0", 35 * MIB, 17 * MIB, 68 * MIB),
            ("RPC1", 199 * MIB, 22 * MIB, 559 * MIB),
            ("Host", 170 * MIB, 0, 48 * MIB),
        ]

    @pytest.mark.parametrize("text", ["", "-c 8192 -ngl 33 -ts 0,33\n", "0.00.002 I printing estimated memory\n"])
    def test_anything_else_is_no_projection(self, text: str) -> None:
        assert FitParams().read(text) == ()


class TestQuestion:
    def test_what_it_does_not_know_is_left_out_and_said(self, header: Header) -> None:
        arguments = ("--jinja", "--slots", "2", "--temp", "-0.5", "-ub", "256", "--rpc", "a:1,b:2")
        _, _, question = _decided(header(SMALL), 2, runtime_args=arguments, split="pipeline", force=True)
        asked = question(HELP)
        assert asked.arguments[:2] == ("--rpc", "a:1,b:2")
        assert asked.arguments[-3:] == ("--no-repack", "--fit-print", "on")
        text = " ".join(asked.arguments)
        assert "--temp -0.5 -ub 256" in text
        assert "--device RPC0,RPC1" in text
        for flag in ("--jinja", "--slots", "--host", "--port"):
            assert flag not in asked.arguments
        assert any("--jinja, --slots" in remark for remark in asked.remarks)
        assert not any("--host" in remark or "--port" in remark for remark in asked.remarks)

    def test_a_shared_cache_is_asked_for_as_one_slot(self, header: Header) -> None:
        shared = _decided(header(SMALL), 1, runtime_args=("-np", "4", "-kvu"))[2](HELP)
        assert not {"--parallel", "-np", "-kvu", "--kv-unified"} & set(shared.arguments)
        assert any("--kv-unified" in remark for remark in shared.remarks)
        alone = _decided(header(SMALL), 1)[2](HELP)
        assert shared.expected == alone.expected
        assert _decided(header(SMALL), 1, users=4)[2](HELP).arguments.count("--parallel") == 1

    def test_expected_are_the_plans_own_figures_and_logits(self, header: Header) -> None:
        plan, _, question = _decided(header(SMALL), 3, runtime_args=("-ts", "2,1,1"), force=True)
        *devices, host = question(HELP).expected
        for device, expected in zip(plan.devices, devices, strict=True):
            memory = device.memory
            assert (memory.weights, memory.kv) == (expected.weights, expected.kv)
            more = expected.compute - memory.compute
            assert MIB < more < 4 * 128256 * 512 if device.has_output else more == pytest.approx(0, abs=16384)
        on_host = plan.host.memory
        assert (host.weights, host.kv) == (on_host.weights, on_host.kv)
        assert host.compute == pytest.approx(on_host.compute, abs=16384)
        assert [bool(expected.compute_more) for expected in (*devices, host)] == [False, True, True, False]

    def test_a_tool_too_old(self, header: Header) -> None:
        with pytest.raises(RuntimeMissingError, match="--fit-print"):
            _decided(header(SMALL), 1)[2](HELP.replace("--fit-print", "--fit-what"))


_SIZES = st.integers(0, 1 << 36)


def _row(expected: Expected, **told: int) -> Row:
    sizes = {"weights": expected.weights, "kv": expected.kv, "compute": expected.compute} | told
    floors = {part: size // MIB * MIB for part, size in sizes.items()}
    return Row(name="GPU 0", expected=expected, projected=Projected(device=expected.device, **floors))


class TestComparison:
    @given(weights=_SIZES, kv=_SIZES, compute=_SIZES, more=_SIZES, share=st.floats(0, 1))
    def test_what_is_equal_or_known_is_no_difference(
        self, weights: int, kv: int, compute: int, more: int, share: float
    ) -> None:
        expected = Expected(device="CUDA0", weights=weights, kv=kv, compute=compute, compute_more=more)
        row = _row(expected, compute=compute + int(more * share))
        assert row.share == 0
        assert not warnings((row,))

    @given(weights=_SIZES, off=st.integers(-(1 << 30), 1 << 30))
    def test_a_difference_in_weights_is_the_difference(self, weights: int, off: int) -> None:
        told = max(weights + off, 0)
        row = _row(Expected(device="CUDA0", weights=weights, kv=0, compute=0), weights=told)
        assert row.difference("weights") == told // MIB * MIB - weights // MIB * MIB
        assert bool(warnings((row,))) == (abs(row.difference("weights")) > TOLERANCE * max(weights, MIB))

    def test_errors_do_not_cancel_out(self) -> None:
        expected = Expected(device="CUDA0", weights=100 * MIB, kv=100 * MIB, compute=0)
        assert warnings((_row(expected, weights=110 * MIB, kv=90 * MIB),))

    def test_devices_missing_and_devices_unplanned(self, header: Header) -> None:
        plan, _, question = _decided(header(SMALL), 1)
        told = (Projected(device="CUDA7", weights=MIB, kv=0, compute=0),)
        compared = rows(plan, Projection(tool="t", question=question(HELP), projected=told))
        assert [row.expected.device for row in compared] == ["RPC0", "Host", "CUDA7"]
        assert [warning.split(":")[0] for warning in warnings(compared)] == ["GPU 0 (card)", "host RAM", "CUDA7"]


class TestFinding:
    @pytest.mark.parametrize("linked", [False, True], ids=["beside it", "beside what a link points to"])
    def test_beside_the_server_before_path(self, tmp_path: Path, *, linked: bool) -> None:
        build, elsewhere = tmp_path / "build", tmp_path / "bin"
        for directory in (build, elsewhere):
            directory.mkdir()
            _tool(directory, "")
        server = build / "llama-server"
        server.touch()
        if linked:
            (tmp_path / "links").mkdir()
            (tmp_path / "links" / "llama-server").symlink_to(server)
            server = tmp_path / "links" / "llama-server"
        found = find_tool(FitParams.search, str(server), {"PATH": str(elsewhere)})
        assert (found.executable, found.origin) == (str(build / "llama-fit-params"), "beside llama-server")
        by_hand = {"PATH": "", "MGPU_LLAMA_FIT_PARAMS": str(elsewhere / "llama-fit-params")}
        assert find_tool(FitParams.search, str(server), by_hand).executable == str(elsewhere / "llama-fit-params")
        found = find_tool(FitParams.search, "/nowhere/llama-server", {"PATH": str(elsewhere)})
        assert (found.executable, found.origin) == (str(elsewhere / "llama-fit-params"), "PATH")

    def test_missing(self) -> None:
        with pytest.raises(RuntimeMissingError, match=r"llama-fit-params beside /nowhere/llama-server, on PATH"):
            find_tool(FitParams.search, "/nowhere/llama-server", {"PATH": "/nowhere"})


class TestAsking:
    @pytest.mark.parametrize(
        ("answer", "words"),
        [
            pytest.param("sys.exit('error: invalid argument: --foo')", "does not know --foo", id="unknown flag"),
            pytest.param("print('hello')", "printed no projection", id="something else"),
            pytest.param("os.abort()", "SIGABRT", id="aborts"),
            pytest.param("import time; time.sleep(60)", "within 1 s", id="hangs"),
        ],
    )
    def test_failures(self, header: Header, tmp_path: Path, answer: str, words: str) -> None:
        _, command, question = _decided(header(SMALL), 1)
        environ = {**os.environ, "MGPU_LLAMA_FIT_PARAMS": str(_tool(tmp_path, answer))}
        with pytest.raises(RuntimeFailedError, match=words):
            project(LlamaCpp(), FitParams(), question, command, environ, timeout_s=1)

    def test_in_the_environment_of_the_command(self, header: Header, tmp_path: Path) -> None:
        _, command, question = _decided(header(SMALL), 1)
        tool = _tool(tmp_path, f"print({RECORDED!r})")
        environ = {**os.environ, "MGPU_LLAMA_FIT_PARAMS": str(tool), "LLAMA_ARG_CTX_SIZE": "1"}
        projection = project(LlamaCpp(), FitParams(), question, command, environ)
        assert [item.device for item in projection.projected] == ["RPC0", "RPC1", "Host"]
        asked = json.loads((tmp_path / "asked.json").read_text())
        assert asked["env"] == {}
        assert tuple(asked["argv"]) == projection.question.arguments


SERVER = """\
import os, sys
words = sys.argv[1:]
if words == ["--version"]:
    print("version: 0.6.0-dev (build 11434, commit 0123abc)")
elif words == ["--help"]:
    print({help!r} + "-lv,   --verbosity, --log-verbosity N")
elif words == ["--list-devices"]:
    print("Available devices:")
    print("  CUDA0: NVIDIA GeForce RTX 3090 (24124 MiB, 23800 MiB free)")
else:
    port = words[words.index("--port") + 1]
    os.execv(sys.executable, [sys.executable, {fake!r}, "--port", port])
"""


@pytest.fixture
def machine(fake_nvml: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with one 3090 (FAKE) and a llama-server (FAKE) in `tmp_path`."""
    config = tmp_path / "machine.toml"
    config.write_text(Machine(rtx_3090(0)).toml(), encoding="utf-8")
    fake = Path(__file__).parent / "fake_llama_server.py"
    server = write_program(tmp_path / "llama-server", SERVER.format(help=HELP, fake=str(fake)))
    return {
        "LD_LIBRARY_PATH": str(fake_nvml),
        "FAKE_NVML_CONFIG": str(config),
        "MGPU_LLAMA_SERVER": str(server),
        "MGPU_LLAMA_FIT_PARAMS": "",
    }


def _as_planned(mgpu: Mgpu, model: Path, env: dict[str, str], directory: Path) -> list[list[int]]:
    """MiB on the card and on the host, as planned with the tool's settings."""
    _tool(directory, "print('Host 1 1 1 ')")
    told = json.loads(mgpu("plan", str(model), "--verify", "--json", env=env).stdout)["verify"]["devices"]
    return [[place["planned"][f"{kind}_bytes"] // MIB for kind in ("weights", "kv", "compute")] for place in told]


class TestCommandLine:
    def test_agreement(self, mgpu: Mgpu, header: Header, machine: dict[str, str], tmp_path: Path) -> None:
        card, host = _as_planned(mgpu, header(SMALL), machine, tmp_path)
        _tool(tmp_path, f"print('CUDA0', *{card}, ''); print('Host', *{host}, '')")
        done = mgpu("plan", str(header(SMALL)), "--verify", env=machine)
        assert done.returncode == 0, done.stderr
        assert "plan and projection agree" in done.stdout
        assert "warning" not in done.stdout
        asked = json.loads((tmp_path / "asked.json").read_text())
        assert asked["env"]["CUDA_VISIBLE_DEVICES"] == rtx_3090(0)["uuid"]

    def test_a_difference_is_said(self, mgpu: Mgpu, header: Header, machine: dict[str, str], tmp_path: Path) -> None:
        card, host = _as_planned(mgpu, header(SMALL), machine, tmp_path)
        card[0] += 500
        _tool(tmp_path, f"print('CUDA0', *{card}, ''); print('Host', *{host}, '')")
        done = mgpu("plan", str(header(SMALL)), "--verify", env=machine)
        assert done.returncode == 0, done.stderr
        assert "+500" in done.stdout
        assert "warning: GPU 0 (RTX 3090): the projection differs" in done.stdout
        told = json.loads(mgpu("plan", str(header(SMALL)), "--verify", "--json", env=machine).stdout)["verify"]
        assert told["agrees"] is False
        assert told["devices"][0]["difference"] == {
            "weights_bytes": 500 * MIB, "kv_bytes": 0, "compute_bytes": 0,
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("arguments", "code", "words"),
        [
            pytest.param(("--rig", "4090"), 2, "this machine's llama.cpp: rig '4090' is not", id="another machine"),
            pytest.param(("--rig", "nonesuch"), 8, "nonesuch", id="no such rig"),
            pytest.param((), 6, "no llama-fit-params beside", id="no such tool"),
        ],
    )
    def test_refusals(
        self, mgpu: Mgpu, header: Header, machine: dict[str, str], arguments: tuple[str, ...], code: int, words: str
    ) -> None:
        done = mgpu("plan", str(header(SMALL)), "--verify", *arguments, env={**machine, "PATH": "/nowhere"})
        assert (done.returncode, done.stdout) == (code, "")
        assert words in done.stderr
        assert "Traceback" not in done.stderr

    def test_not_for_urls(self, mgpu: Mgpu) -> None:
        done = mgpu("plan", "https://example.invalid/m.gguf", "--verify")
        assert done.returncode == 2
        assert "needs the file here" in done.stderr

    def test_what_does_not_fit_is_not_asked_about(
        self, mgpu: Mgpu, header: Header, machine: dict[str, str], tmp_path: Path
    ) -> None:
        _tool(tmp_path, "sys.exit('asked')")
        model = str(header("Llama-3.3-70B-Instruct-Q4_K_M"))
        done = mgpu("plan", model, "--verify", "--offload", "never", env=machine)
        assert done.returncode == 5
        assert not (tmp_path / "asked.json").exists()


def _kept() -> list[dict[str, Any]]:
    log = Path(os.environ["XDG_STATE_HOME"]) / "mgpu" / "measured.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


class TestLog:
    def test_a_launch_is_kept_and_a_difference_is_said(
        self, mgpu: Mgpu, header: Header, machine: dict[str, str]
    ) -> None:
        for n in (1, 2):
            done = mgpu("run", str(header(SMALL)), "--prompt", "Hello?", "--", "-ub", "256", env=machine)
            assert done.returncode == 0, done.stderr
            assert "warning: GPU 0 holds nothing" in done.stderr  # the fake's buffers are all on the CPU
            assert "measured.jsonl" in done.stderr
            assert len(_kept()) == n
        kept = _kept()[-1]
        assert (kept["version"], kept["quantization"]) == ("0.6.0-dev (build 11434)", "Q4_K_M")
        assert kept["gpus"] == ["NVIDIA GeForce RTX 3090"]
        assert kept["settings"]["runtime_args"] == ["-ub", "256"]
        card, host = kept["devices"]
        assert card["reported"] == {}
        assert card["planned"]["weights"] > 4000 * MIB
        assert host["reported"] == {"weights": 12 * MIB, "kv": 3 * MIB}
        assert host["planned"].keys() == host["reported"].keys()

    def test_a_log_that_cannot_be_written_is_a_note(self, mgpu: Mgpu, header: Header, machine: dict[str, str]) -> None:
        (Path(os.environ["XDG_STATE_HOME"]) / "mgpu" / "measured.jsonl").mkdir(parents=True)
        done = mgpu("run", str(header(SMALL)), "--prompt", "Hello?", env=machine)
        assert done.returncode == 0, done.stderr
        assert "note: cannot keep plan and report" in done.stderr

    def test_the_newest_are_kept(self, header: Header, tmp_path: Path) -> None:
        path = tmp_path / "state" / "measured.jsonl"
        plan, _, _ = _decided(header(SMALL), 1)
        adapter = LlamaCpp()
        launched = Launched(
            adapter=adapter, installed=adapter.assumed(), rig=rig_of(gpu_of("rpc")), model=read(str(header(SMALL))),
            request=Request(runtime_args=("--lora", "/\udcff.gguf")), plan=plan,
        )  # fmt: skip
        path.parent.mkdir()
        path.write_text("".join(f"{n}\n" for n in range(KEPT + 7)))
        assert keep(launched, (), path) is None
        lines = path.read_text().splitlines()
        assert len(lines) == KEPT
        assert lines[0] == "8"
        assert json.loads(lines[-1])["settings"]["runtime_args"][1] == "/\udcff.gguf"
        assert [item.name for item in path.parent.iterdir()] == ["measured.jsonl"]

    @given(off=st.integers(-(1 << 28), 1 << 28))
    def test_two_per_cent_of_a_device(self, header: Header, off: int) -> None:
        plan, command, _ = _decided(header(SMALL), 1)
        memory = plan.devices[0].memory
        buffers = [
            Buffer(device="RPC0", kind="weights", n_bytes=memory.weights + off),
            Buffer(device="RPC0", kind="kv", n_bytes=memory.kv),
            Buffer(device="RPC0", kind="compute", n_bytes=memory.compute),
            Buffer(device="CPU_Mapped", kind="weights", n_bytes=1),  # no measure of anything
            Buffer(device="CPU", kind="output", n_bytes=1 << 30),
        ]
        (place,) = measure(plan, command.devices, buffers)
        planned = memory.weights + memory.kv + memory.compute
        assert (place.warning is not None) == (abs(off) > TOLERANCE * planned)

    def test_a_silent_runtime_is_not_measured(self, header: Header) -> None:
        plan, command, _ = _decided(header(SMALL), 1)
        assert measure(plan, command.devices, ()) == ()

    @pytest.mark.runtime
    def test_a_real_launch_is_as_planned(self, mgpu: Mgpu, real_gguf: Path, llama_server: str) -> None:
        env = {"MGPU_LLAMA_SERVER": llama_server}
        done = mgpu("run", str(real_gguf), "--ctx", "1024", "--prompt", "Hi", "--", "-n", "2", env=env, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "planned" not in done.stderr
        (kept,) = _kept()
        for place in kept["devices"]:
            assert place["reported"]
            for kind, planned in place["planned"].items():
                assert place["reported"][kind] == pytest.approx(planned, abs=0.02 * MIB), (place, kind)


@pytest.fixture(scope="module")
def fit_params() -> Path:
    """A real llama-fit-params, or a skip that says how to get it."""
    server = find_runtime(LlamaCpp.search, explicit=None, environ=os.environ)
    try:
        found = find_tool(FitParams.search, server.executable if server else "/nowhere/llama-server", os.environ)
    except RuntimeMissingError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    return Path(found.executable)


@pytest.fixture(scope="module")
def remote_devices(fit_params: Path) -> Iterator[str]:
    """Two real ggml-rpc-server on loopback, as `--rpc` takes them; or a skip."""
    program = fit_params.with_name("ggml-rpc-server")
    if not program.exists():
        pytest.skip(f"no {program}: build llama.cpp with -DGGML_RPC=ON")
    ports = [_free_port() for _ in range(2)]
    started = [
        subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for port in ports
    ]
    try:
        for port in ports:
            _wait_for(port)
        yield ",".join(f"127.0.0.1:{port}" for port in ports)
    finally:
        for process in started:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    pytest.fail(f"nothing listens on {port}")


@pytest.mark.runtime
class TestRealTool:
    @pytest.mark.parametrize(
        "name", [SMALL, "Qwen3-30B-A3B-Q4_K_M", "gemma-3-27b-it-Q4_K_M", "gpt-oss-20b-MXFP4", "GLM-4.5-Air-Q4_K_M"]
    )
    @pytest.mark.parametrize(
        "asked",
        [
            pytest.param({"split": "pipeline"}, id="two devices"),
            pytest.param({"split": "none", "ctx": 4096, "users": 3}, id="one device"),
            pytest.param({"split": "pipeline", "kv_type": "q8_0", "arguments": ("-ts", "3,1")}, id="q8_0, 3 to 1"),
            pytest.param({"arguments": ("-ngl", "7", "-ts", "1,1")}, id="most on the host"),
            pytest.param({"arguments": ("-np", "3", "-kvu", "-c", "6000", "--jinja")}, id="shared cache"),
        ],
    )
    def test_every_device_is_as_planned(
        self, header: Header, fit_params: Path, remote_devices: str, name: str, asked: dict[str, Any]
    ) -> None:
        more = {key: value for key, value in asked.items() if key != "arguments"}
        arguments = (*asked.get("arguments", ()), "--rpc", remote_devices)
        plan, command, question = _decided(header(name), 2, runtime_args=arguments, force=True, offload="allow", **more)
        environ = {**os.environ, "MGPU_LLAMA_FIT_PARAMS": str(fit_params)}
        projection = project(LlamaCpp(), FitParams(), question, command, environ)
        told = verified_object(plan, projection)
        assert told["warnings"] == []
        for device in told["devices"]:
            assert device["difference"]["weights_bytes"] == 0, device
            assert device["difference"]["kv_bytes"] == 0, device
            assert abs(device["difference"]["compute_bytes"]) <= MIB, device

    def test_by_the_command_line(self, mgpu: Mgpu, real_gguf: Path, fit_params: Path, llama_server: str) -> None:
        env = {"MGPU_LLAMA_SERVER": llama_server, "MGPU_LLAMA_FIT_PARAMS": str(fit_params)}
        done = mgpu("plan", str(real_gguf), "--verify", "--users", "2", "--json", env=env)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)["verify"]
        assert told["agrees"] is True
        assert told["devices"][-1]["device"] == "Host"
