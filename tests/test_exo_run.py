"""`mgpu run --runtime exo` against a FAKE cluster: placed, proven, used, deleted; and every way it goes wrong."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from conftest import Mgpu
from fake_started import Running, recorded, started
from safetensors_writer import Store, awq, mlx_4bit, small_config, small_tensors, write_model

SMALL = "mlx-community/Llama-3.2-1B-Instruct-4bit"
LARGE = "mlx-community/Llama-3.3-70B-Instruct-8bit"
_MODELS = ("--model", f"{SMALL}=0.7", "--model", f"{LARGE}=65")
_NODES = ("--node", "studio=60", "--node", "mini=10")

Cluster = Callable[..., str]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """`cluster(fault=…)`: the address of a FAKE cluster of two Macs; its requests are in `requests.jsonl`."""
    with ExitStack() as stack:

        def start(*more: str, fault: str = "none", nodes: tuple[str, ...] = _NODES) -> str:
            record = ("--record", str(tmp_path / "requests.jsonl"))
            return stack.enter_context(
                started("fake_exo.py", tmp_path, *nodes, *_MODELS, "--fault", fault, *record, *more)
            )

        yield start


def _run(
    mgpu: Mgpu, url: str, *words: str, model: str = SMALL, prompt: str = "Why?"
) -> subprocess.CompletedProcess[str]:
    return mgpu("run", model, "--runtime", "exo", "--prompt", prompt, *words, env={"MGPU_EXO_URL": url})


def _instances(url: str) -> dict[str, Any]:
    with urlopen(f"{url}/state") as response:
        instances: dict[str, Any] = json.load(response)["instances"]
    return instances


def _requests(tmp_path: Path, method: str) -> list[str]:
    return [one["path"] for one in recorded(tmp_path / "requests.jsonl") if one["method"] == method]


def test_a_model_that_one_node_holds_goes_to_one_node(mgpu: Mgpu, cluster: Cluster, tmp_path: Path) -> None:
    url = cluster()
    done = _run(mgpu, url)
    assert (done.returncode, done.stdout) == (0, "It said: Why?\n"), done.stderr
    assert "2 nodes (studio, mini), 70.0 of 192.0 GiB free" in done.stderr
    assert "one node is enough" in done.stderr
    assert "\n  on studio\n" in done.stderr
    assert "no password" in done.stderr
    assert len(_requests(tmp_path, "DELETE")) == 1
    assert _instances(url) == {}


def test_a_model_too_large_for_one_node_is_split_by_exo(mgpu: Mgpu, cluster: Cluster) -> None:
    done = _run(mgpu, cluster(), model=LARGE)
    assert done.returncode == 0, done.stderr
    assert "on studio (layers 0-7) + mini (layers 8-15)" in done.stderr
    assert "2 nodes, pipeline over sockets" in done.stderr


def test_tensor_ranks_are_asked_for(mgpu: Mgpu, cluster: Cluster, tmp_path: Path) -> None:
    done = _run(mgpu, cluster(), "--split", "tensor", model=LARGE)
    assert done.returncode == 0, done.stderr
    assert "tensor ranks over sockets" in done.stderr
    created = next(one for one in recorded(tmp_path / "requests.jsonl") if one["path"] == "/instance")
    shards = created["body"]["instance"]["MlxRingInstance"]["shardAssignments"]["runnerToShard"]
    assert [list(shard) for shard in shards.values()] == [["TensorShardMetadata"]] * 2


def test_what_runs_already_is_used_and_left(mgpu: Mgpu, cluster: Cluster, tmp_path: Path) -> None:
    url = cluster("--running", SMALL)
    done = _run(mgpu, url)
    assert (done.returncode, done.stdout) == (0, "It said: Why?\n"), done.stderr
    assert "left running at the end" in done.stderr
    assert "/instance" not in _requests(tmp_path, "POST")
    assert _requests(tmp_path, "DELETE") == []
    assert len(_instances(url)) == 1


def test_thoughts_prove_a_model_too(mgpu: Mgpu, cluster: Cluster) -> None:
    assert _run(mgpu, cluster(fault="reasoning")).returncode == 0


def test_the_download_is_shown(mgpu: Mgpu, cluster: Cluster) -> None:
    done = _run(mgpu, cluster(fault="downloads"))
    assert done.returncode == 0, done.stderr
    assert "its nodes download the model" in done.stderr


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("not-exo", 6, "is not Exo as mgpu knows it"),
        ("no-nodes", 6, "has no node yet"),
        ("refuses-instance", 5, "Insufficient memory to create instance"),
        ("runner-fails", 7, "studio: [metal::malloc] out of memory"),
        ("download-fails", 7, "studio: 401 Client Error"),
        ("error-instead-of-token", 7, "answers the first request with: [metal::malloc] out of memory"),
        ("no-token", 7, "without a token"),
        ("dies-while-loading", 7, "lost the Exo cluster"),
    ],
)
def test_each_failure_is_one_line_and_a_hint(mgpu: Mgpu, cluster: Cluster, fault: str, code: int, words: str) -> None:
    url = cluster(fault=fault)
    done = _run(mgpu, url)
    assert done.returncode == code, done.stderr
    complaint = done.stderr.split("mgpu: ")[1]
    assert words in complaint
    assert len(complaint.partition("      report, ready to paste")[0].splitlines()) == 2
    assert "Traceback" not in done.stderr
    if fault not in {"not-exo", "dies-while-loading"}:
        assert _instances(url) == {}


def test_no_service_says_how_to_start_one(mgpu: Mgpu) -> None:
    done = _run(mgpu, "http://127.0.0.1:9")
    assert done.returncode == 6
    assert "no exo answers at http://127.0.0.1:9 ($MGPU_EXO_URL)" in done.stderr
    assert "uv run exo" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        ((LARGE, "--split", "none"), 5, "studio has 60.0 GiB free"),
        ((SMALL, "--split", "tensor"), 3, "--split tensor is needless: studio alone holds the 717 MiB"),
        (("mlx-community/Llama-3.2-1B", ""), 4, "Exo cannot use mlx-community/Llama-3.2-1B"),
        (("Llama-3.2-3B-Instruct-4bit", ""), 4, "did you mean"),
        ((SMALL, "--", "--force-master"), 2, "--force-master cannot be given to Exo"),
    ],
)
def test_refusals(mgpu: Mgpu, cluster: Cluster, words: tuple[str, ...], code: int, complaint: str) -> None:
    model, *more = (word for word in words if word)
    done = mgpu("run", model, "--runtime", "exo", *more, env={"MGPU_EXO_URL": cluster()})
    assert done.returncode == code, done.stderr
    assert complaint in done.stderr


def test_force_splits_all_the_same(mgpu: Mgpu, cluster: Cluster) -> None:
    done = _run(mgpu, cluster(), "--split", "pipeline", "--force")
    assert done.returncode == 0, done.stderr
    assert "on studio (layers 0-7) + mini (layers 8-15)" in done.stderr


def test_a_cluster_that_is_too_small(mgpu: Mgpu, cluster: Cluster) -> None:
    done = _run(mgpu, cluster(nodes=("--node", "mini=10")), model=LARGE)
    assert done.returncode == 5
    assert "the 65.0 GiB of weights do not fit: 1 node with 10.0 GiB free together, short by 55.0 GiB" in done.stderr


def test_a_gguf_is_refused_with_what_would_do(mgpu: Mgpu, cluster: Cluster, header: Callable[[str], Path]) -> None:
    done = _run(mgpu, cluster(), model=str(header("Llama-3.1-8B-Instruct-Q4_K_M")))
    assert done.returncode == 6
    assert "reads no gguf" in done.stderr
    assert "mlx-community/" in done.stderr


def test_ctrl_c_deletes_the_instance(cluster: Cluster, python_path: str) -> None:
    url = cluster()
    running = Running("run", SMALL, "--runtime", "exo", env={"MGPU_EXO_URL": url, "PYTHONPATH": python_path})
    running.wait_until("ready after")
    assert len(_instances(url)) == 1
    assert running.interrupt() == 130, running.stderr
    assert _instances(url) == {}


def test_ctrl_c_while_it_loads_deletes_it_too(cluster: Cluster, python_path: str) -> None:
    url = cluster(fault="slow-load")
    running = Running("run", SMALL, "--runtime", "exo", env={"MGPU_EXO_URL": url, "PYTHONPATH": python_path})
    running.wait_until("loading layer 3 of 16")
    assert running.interrupt() == 130, running.stderr
    assert _instances(url) == {}


@pytest.mark.parametrize(
    ("fault", "words"), [("dies-after-ready", "lost the Exo cluster"), ("instance-goes", "its instance has gone")]
)
def test_lost_while_it_is_used(cluster: Cluster, python_path: str, fault: str, words: str) -> None:
    url = cluster(fault=fault)
    running = Running("run", SMALL, "--runtime", "exo", env={"MGPU_EXO_URL": url, "PYTHONPATH": python_path})
    running.wait_until("ready after")
    assert running.wait() == 7
    assert words in running.stderr.split("mgpu: ")[1]


def test_the_dry_run_is_a_request_that_exo_takes(mgpu: Mgpu, cluster: Cluster) -> None:
    url = cluster()
    done = mgpu("run", SMALL, "--runtime", "exo", "--dry-run", env={"MGPU_EXO_URL": url})
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "curl -fsS -X POST -H 'Content-Type: application/json' -d "
        f'\'{{"model_id": "{SMALL}", "sharding": "Pipeline", "instance_meta": "MlxRing", "min_nodes": 1}}\' '
        f"{url}/place_instance\n"
    )


def test_the_plan_as_json(mgpu: Mgpu, cluster: Cluster) -> None:
    done = mgpu("plan", LARGE, "--runtime", "exo", "--json", env={"MGPU_EXO_URL": cluster()})
    told = json.loads(done.stdout)["plan"]
    assert (told["placement"], told["runtime"], told["devices"]) == ("attach", "exo", [])
    assert told["attached"].endswith("2 nodes (studio, mini), 70.0 of 192.0 GiB free")
    assert {rule["id"]: rule["verdict"] for rule in told["rules"]} == {
        "fits-one-card": "passes",
        "runtime-choice": "passes",
        "network-last": "passes",
    }


def test_a_plan_for_another_rig_asks_nobody(mgpu: Mgpu) -> None:
    done = mgpu("plan", SMALL, "--runtime", "exo", "--rig", "m3-max-64", env={"MGPU_EXO_URL": "http://127.0.0.1:9"})
    assert done.returncode == 0, done.stderr
    assert "(not asked)" in done.stdout.replace("\n", " ")


@pytest.mark.parametrize(("store", "code"), [(mlx_4bit, 0), (awq(), 6)])
def test_a_directory_named_as_exo_names_them(
    mgpu: Mgpu, cluster: Cluster, tmp_path: Path, store: Store, code: int
) -> None:
    quantization = {"quant_method": "mlx" if code == 0 else "awq", "bits": 4, "group_size": 64 if code == 0 else 128}
    directory = tmp_path / SMALL.replace("/", "--")
    write_model(directory, small_config(quantization_config=quantization), small_tensors(store))
    done = _run(mgpu, cluster(), model=str(directory))
    assert done.returncode == code, done.stderr
    assert (f"model {SMALL}" if code == 0 else "is AWQ-4bit") in done.stderr
