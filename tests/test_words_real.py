"""A real llama-server's own words: of requests it served, of its metrics, and of memory it does not get."""

from __future__ import annotations

import resource
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from mgpu.adapter import Cause, Served
from mgpu.launch.ports import free_port
from mgpu.units import MIB
from mgpu_adapters.llamacpp.adapter import LlamaCpp

pytestmark = pytest.mark.runtime

ADAPTER = LlamaCpp()


def _causes(lines: Sequence[str]) -> list[Cause]:
    return [fact for fact in map(ADAPTER.read_log, lines) if isinstance(fact, Cause)]


def _known(causes: Sequence[Cause]) -> Cause:
    cause = causes[0]
    for later in causes[1:]:
        cause = cause.with_more(later)
    return cause


def _failing(server: str, model: Path, *args: str, limit: int | None = None) -> list[str]:
    """What it says until it ends. `limit`: bytes of address space."""

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    argv = [server, "-m", str(model), "--fit", "off", "-np", "1", "-lv", "4", "--port", str(_port()), *args]
    done = subprocess.run(argv, preexec_fn=restrict, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    return (done.stdout + done.stderr).splitlines()


def _port() -> int:
    return free_port("127.0.0.1", wanted=None)


@contextmanager
def _serving(server: str, model: Path, log: Path) -> Iterator[str]:
    port = _port()
    argv = [server, "-m", str(model), "--device", "none", "--fit", "off", "-c", "512", "-np", "2", "--metrics"]
    with log.open("wb") as file:
        process = subprocess.Popen([*argv, "-lv", "4", "--port", str(port)], stdout=file, stderr=file)
    try:
        while "listening on" not in log.read_text(errors="replace"):
            assert process.poll() is None, log.read_text(errors="replace")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _ask(url: str, body: bytes | None = None) -> str:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        text: str = response.read().decode()
        return text


def test_metrics_and_the_log_agree(llama_server: str, real_gguf: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with _serving(llama_server, real_gguf, log) as url:
        for n_tokens in (20, 12):
            _ask(f"{url}/completion", b'{"prompt": "Water boils at", "ignore_eos": true, "n_predict": %d}' % n_tokens)
        stats = ADAPTER.read_metrics(_ask(f"{url}/metrics"))
    facts = [ADAPTER.read_log(line) for line in log.read_text(errors="replace").splitlines()]
    served = [fact for fact in facts if isinstance(fact, Served)]
    assert [fact.n_tokens for fact in served] == [20, 12]
    assert stats is not None
    assert (stats.running, stats.waiting, stats.generated) == (0, 0, 32)
    assert stats.generating_s == pytest.approx(sum(fact.seconds for fact in served), rel=0.01)


def test_too_little_ram(llama_server: str, real_gguf: Path) -> None:
    """The cache: 65,536 tokens of F32."""
    lines = _failing(
        llama_server, real_gguf, "--device", "none", "-c", "65536", "-ctk", "f32", "-ctv", "f32", limit=900_000 << 10
    )
    first = _causes(lines)[0]
    assert first.out_of_memory
    assert first.devices == ("CPU",)
    assert first.wanted_bytes == 384 * MIB
    assert _known(_causes(lines)).text == "out of RAM (asked for 384 MiB)"


@pytest.mark.vulkan
def test_too_little_of_a_device(
    llama_server: str, real_gguf: Path, two_vulkan_devices: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in two_vulkan_devices.items():
        monkeypatch.setenv(name, value)
    lines = _failing(llama_server, real_gguf, "--device", "Vulkan0,Vulkan1", "-ngl", "99", "-c", "8000000")
    causes = _causes(lines)
    assert causes[0].wanted_bytes == 4_096_000_000  # of the first line, which names no device
    known = _known(causes)
    assert (known.devices, known.wanted_bytes) == (("Vulkan0",), 4_096_000_000)


def test_a_flag_it_does_not_know_is_no_want_of_memory(llama_server: str, real_gguf: Path) -> None:
    (cause,) = _causes(_failing(llama_server, real_gguf, "--memory"))[:1]
    assert not cause.out_of_memory
