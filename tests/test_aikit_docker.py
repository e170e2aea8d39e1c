"""What Docker says, and the one thing that lacks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aikit_docker as said
from mgpu.adapter import Cause, Probe, Stage
from mgpu.errors import RuntimeMissingError
from mgpu_adapters.aikit.adapter import AIKit
from mgpu_adapters.aikit.docker import IMAGE_INSPECT, INFO, VERSION
from mgpu_adapters.aikit.log import read_line
from planning import card, rig_of

AIKIT = AIKit()


def probe(version: str = said.VERSION, info: str = said.INFO, image: str = said.IMAGE_NOW) -> Probe:
    return Probe(
        executable="/usr/bin/docker", origin="PATH", outputs={VERSION: version, INFO: info, IMAGE_INSPECT: image}
    )


@pytest.mark.parametrize("info", [said.INFO, said.WITH_CDI])
@pytest.mark.parametrize("image", [said.IMAGE_NOW, said.image(None), said.image([])])
def test_all_is_there(info: str, image: str) -> None:
    installed = AIKIT.installed(probe(info=info, image=image))
    assert (installed.executable, installed.runtime) == ("/usr/bin/docker", "aikit")
    assert installed.version == "0.20.0 (vLLM) in Docker 29.4.0"


@pytest.mark.parametrize(
    ("there", "lacks", "hint"),
    [
        (
            probe(version=said.CLIENT + said.NO_DAEMON, info=said.NO_DAEMON),
            "does not answer at unix:///var/run",
            "star",
        ),
        (
            probe(version=said.CLIENT + said.NO_DAEMON_NOW, info=said.NO_DAEMON_NOW),
            "daemon does not answer",
            "systemct",
        ),
        (probe(version=said.CLIENT + said.NO_PERMISSION, info=said.NO_PERMISSION), "permission denied", "usermod"),
        (probe(version=said.CLIENT + said.NO_PERMISSION_NOW, info=""), "permission denied", "usermod"),
        (probe(info=said.WITHOUT_TOOLKIT), "no NVIDIA Container Toolkit", "nvidia-ctk runtime configure"),
        (probe(image=said.NO_IMAGE), "razerofficial/aikit:latest is not on this machine", "docker pull"),
        (probe(image=said.image(["/opt/start.sh", "--conda"])), "entry point is /opt/start.sh --conda", "docker pull"),
        (probe(image="segmentation fault"), "nothing of the image", "docker pull"),
        (probe(version="", info="", image=""), "says nothing", "docker info"),
        (probe(version="no such command\n"), "no such command", "docker info"),
    ],
)
def test_what_lacks_is_said_with_the_command_that_brings_it(there: Probe, lacks: str, hint: str) -> None:
    with pytest.raises(RuntimeMissingError) as caught:
        AIKIT.installed(there)
    assert lacks in caught.value.message
    assert hint in caught.value.hint


@given(st.text(), st.text(), st.text())
def test_any_text_is_refused_in_one_line(version: str, info: str, image: str) -> None:
    with pytest.raises(RuntimeMissingError) as caught:
        AIKIT.installed(probe(version, info, image))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("line", "text", "hint"),
    [
        (
            'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].',
            "no NVIDIA Container Toolkit",
            "nvidia-ctk",
        ),
        (
            "nvidia-container-cli: initialization error: nvml error: driver not loaded: unknown.",
            "driver not loaded",
            "nvidia-smi",
        ),
        (
            'Error response from daemon: Conflict. The container name "/mgpu-aikit-8080" is already in use by "0123".',
            "mgpu-aikit-8080",
            "docker rm --force mgpu-aikit-8080",
        ),
        ("Bind for 127.0.0.1:8080 failed: port is already allocated.", "port is in use", "--port"),
        (
            'invalid mount config for type "bind": bind source path does not exist: /models/m.',
            "/models/m",
            "--runtime vllm",
        ),
        ("PermissionError: [Errno 13] Permission denied: '/models/m/model.safetensors'", "may not read", "chmod"),
        ("(EngineCore pid=7) torch.OutOfMemoryError: CUDA out of memory.", "out of memory", "--ctx"),
    ],
)
def test_causes_are_read(line: str, text: str, hint: str) -> None:
    fact = read_line(line)
    assert isinstance(fact, Cause)
    assert text in fact.text
    assert hint in fact.hint
    assert "{" not in fact.text


def test_stages_are_read() -> None:
    assert read_line("Unable to find image 'razerofficial/aikit:latest' locally") == Stage(text="fetching the image")
    assert read_line("(Worker_TP0 pid=9) INFO Starting to load model /models/m...") == Stage(text="loading weights")


def test_cards_that_are_not_nvidias_are_disabled() -> None:
    rig = rig_of(card(0, 24, 936, compute_capability="8.6"), card(1, 8, 256, compute_capability="6.1"))
    bound = AIKIT.bind(rig, ())
    assert [gpu.enabled for gpu in bound.gpus] == [True, False]
    assert "Razer AIKit cannot use GPU 1" in bound.findings[-1].text
    assert AIKIT.why_not_gpu(rig.gpus[0]) is None
    assert "6.1" in (AIKIT.why_not_gpu(rig.gpus[1]) or "")
