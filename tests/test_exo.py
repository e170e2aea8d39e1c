"""Exo's adapter, without a cluster: which model is meant, which placement is taken, how loading is read, the plan."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mgpu.adapter import Endpoint, Probe
from mgpu.cluster import Remote
from mgpu.decide.attach import attach_plan
from mgpu.errors import BadModelError, DoesNotFitError, MgpuError, RuntimeFailedError, RuntimeMissingError
from mgpu.inspect.named import named_model
from mgpu.model import Model, ModelFile
from mgpu.plan import Layout, Plan, Shape
from mgpu.request import Request
from mgpu.rig import Gpu, Rig
from mgpu.service import Answer, Call, Talk, Told
from mgpu.units import GIB
from mgpu_adapters.exo.adapter import Exo
from mgpu_adapters.exo.answers import has_token, reason
from mgpu_adapters.exo.attachment import ExoAttachment
from mgpu_adapters.exo.loading import Loading
from mgpu_adapters.exo.names import model_id
from mgpu_adapters.exo.placing import Wish, best_placement, unplaceable
from mgpu_adapters.exo.state import Preview, State, decode

MODEL = "mlx-community/Llama-3.2-1B-Instruct-4bit"
URL = "http://127.0.0.1:52415"


def _directory(path: str, quantization: str = "MLX-4bit", model_format: str = "safetensors") -> Model:
    files = (ModelFile(path=f"{path}/model.safetensors", n_bytes=1),)
    named = named_model("x", "gguf" if model_format == "gguf" else "safetensors")
    return replace(named, path=path, files=files, quantization=quantization)


# Names


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("/models/mlx-community--Llama-3.2-1B-Instruct-4bit", ()),
        ("/models/mlx-community/Llama-3.2-1B-Instruct-4bit/", ()),
        ("/hub/models--mlx-community--Llama-3.2-1B-Instruct-4bit/snapshots/0123abc", ()),
        ("/models/mlx-community--Llama-3.2-1B-Instruct-4bit", (MODEL, "other/model")),
    ],
)
def test_a_directory_says_its_id_by_its_name(path: str, known: tuple[str, ...]) -> None:
    assert model_id(_directory(path), known) == MODEL


@pytest.mark.parametrize("path", ["/models/mine", "/models/--x"])
def test_a_directory_of_another_name_is_asked_back(path: str) -> None:
    with pytest.raises(BadModelError, match="does not say which model") as caught:
        model_id(_directory(path), (MODEL,))
    assert "mlx-community" in caught.value.hint


@pytest.mark.parametrize(
    ("quantization", "shown"), [("AWQ-4bit", "AWQ-4bit"), ("GPTQ-4bit-g128", "GPTQ"), ("FP8", "FP8")]
)
def test_weights_that_mlx_cannot_load(quantization: str, shown: str) -> None:
    with pytest.raises(RuntimeMissingError, match=shown):
        model_id(_directory("/models/a/b", quantization), ())


@pytest.mark.parametrize("quantization", ["MLX-4bit", "BF16", "FP16", "MXFP4"])
def test_weights_that_mlx_loads(quantization: str) -> None:
    assert model_id(_directory("/models/a/b", quantization), ()) == "a/b"


def test_the_last_part_of_an_id_is_enough_where_there_is_one() -> None:
    known = (MODEL, "a/Same", "b/Same")
    assert model_id(named_model("llama-3.2-1b-instruct-4bit", "safetensors"), known) == MODEL
    with pytest.raises(BadModelError, match="the name of 2 models") as caught:
        model_id(named_model("same", "safetensors"), known)
    assert "a/Same, b/Same" in caught.value.hint


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=20), max_size=4))
def test_any_name_is_an_id_or_refused(text: str, known: list[str]) -> None:
    try:
        found = model_id(named_model(text, "safetensors"), known)
    except MgpuError as error:
        found = ""
        said = error.message
    assert found in known or found.count("/") == 1 or len(said.splitlines()) == 1


# Placements


def _preview(n_nodes: int, sharding: str = "Pipeline", meta: str = "MlxRing", error: str | None = None) -> Preview:
    runners = {f"node-{n}": f"runner-{n}" for n in range(n_nodes)}
    shards = {runner: {f"{sharding}ShardMetadata": {"startLayer": 0, "endLayer": 16}} for runner in runners.values()}
    assignments = {"modelId": MODEL, "nodeToRunner": runners, "runnerToShard": shards}
    instance = {f"{meta}Instance": {"instanceId": f"{meta}-{sharding}-{n_nodes}", "shardAssignments": assignments}}
    return Preview(sharding=sharding, instance_meta=meta, instance=None if error else instance, error=error)


_NO_MEMORY = "No cycles found with sufficient memory"


def test_the_fewest_nodes_win() -> None:
    previews = [_preview(3), _preview(2), _preview(1), _preview(2, "Tensor", "MlxJaccl")]
    assert best_placement(previews, Wish(model_id=MODEL)) is previews[2]


def test_on_several_nodes_rdma_has_tensor_ranks_and_sockets_a_pipeline() -> None:
    sockets = [_preview(2, "Tensor"), _preview(2)]
    rdma = [_preview(2, meta="MlxJaccl"), _preview(2, "Tensor", "MlxJaccl")]
    wish = Wish(model_id=MODEL)
    assert best_placement(sockets, wish) is sockets[1]
    assert best_placement([*sockets, *rdma], wish) is rdma[1]
    assert best_placement([*sockets, *rdma], Wish(model_id=MODEL, sharding="Pipeline", min_nodes=2)) is rdma[0]


_PREVIEWS = st.lists(
    st.builds(
        _preview,
        st.integers(1, 4),
        st.sampled_from(["Pipeline", "Tensor"]),
        st.sampled_from(["MlxRing", "MlxJaccl"]),
        st.sampled_from([None, None, _NO_MEMORY]),
    ),
    max_size=8,
)
_WISHES = st.builds(
    Wish,
    model_id=st.just(MODEL),
    sharding=st.sampled_from(["", "Pipeline", "Tensor"]),
    min_nodes=st.integers(1, 2),
    max_nodes=st.sampled_from([None, 1, 2]),
)


@given(_PREVIEWS, _WISHES)
def test_a_placement_is_as_wished_or_its_lack_is_explained(previews: list[Preview], wish: Wish) -> None:
    best = best_placement(previews, wish)
    allowed = [one for one in previews if one.error is None and wish.allows(one.n_nodes, one.sharding)]
    if best is None:
        assert not allowed
        error = unplaceable(previews, wish)
        assert error.message
        assert error.hint
    else:
        assert best in allowed
        assert best.n_nodes == min(one.n_nodes for one in allowed)


def test_a_lack_of_memory_is_a_misfit_and_other_refusals_are_failures() -> None:
    wish = Wish(model_id=MODEL)
    assert isinstance(unplaceable([_preview(1, error=_NO_MEMORY)], wish), DoesNotFitError)
    assert type(unplaceable([_preview(1, error="MLX ring backend requires connectivity")], wish)) is RuntimeFailedError


# Loading


def _state(kind: str, **body: Any) -> State:
    instance = (_preview(1).instance or {}).copy()
    tagged = {"MlxRing-Pipeline-1": instance}
    return decode({"instances": tagged, "runners": {"runner-0": {kind: body}}}, State)


def _look(loading: Loading, state: State, times: int) -> None:
    for _ in range(times):
        loading.look(state)


def test_what_stands_still_is_given_up_and_what_moves_is_not() -> None:
    moving = Loading(MODEL, "MlxRing-Pipeline-1")
    for layer in range(3000):
        told = moving.look(_state("RunnerLoading", layersLoaded=layer, totalLayers=3000))
    assert told.text == "node-0: loading layer 2999 of 3000"
    still = Loading(MODEL, "MlxRing-Pipeline-1")
    with pytest.raises(RuntimeFailedError, match="has not come further"):
        _look(still, _state("RunnerConnecting"), 3000)


def test_a_failed_runner_may_be_tried_again() -> None:
    loading = Loading(MODEL, "MlxRing-Pipeline-1")
    _look(loading, _state("RunnerFailed", errorMessage="boom", diagnostics=[]), 5)
    assert loading.look(_state("RunnerReady")) == Told(text="on node-0", stays=True)
    assert loading.ready


def test_an_instance_that_vanishes_names_its_last_failure() -> None:
    loading = Loading(MODEL, "MlxRing-Pipeline-1")
    loading.look(_state("RunnerFailed", errorMessage="boom", diagnostics=[]))
    with pytest.raises(RuntimeFailedError, match="while it was loading: node-0: boom"):
        loading.look(State())


def test_an_instance_that_never_comes_is_given_up() -> None:
    loading = Loading(MODEL, "none")
    with pytest.raises(RuntimeFailedError, match="made no instance of it in 60 s"):
        _look(loading, State(), 200)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_answer_has_a_reason_in_one_piece(body: Any) -> None:
    assert 0 < len(reason(Answer(status=500, body=body))) <= 300
    has_token(Answer(status=200, body=body))


# Talks


def _drive(talk: Talk, answers: dict[str, list[int]]) -> list[str]:
    """The methods that were called; each answer is a status without a body."""
    asked: list[str] = []
    answer: Answer | None = None
    while True:
        try:
            step = talk.send(answer)
        except StopIteration:
            return asked
        answer = None
        if isinstance(step, Call):
            asked.append(step.method)
            answer = Answer(status=answers[step.method].pop(0), body={})


def test_an_instance_asked_for_at_the_last_moment_is_still_deleted() -> None:
    """Stopped before Exo has made it: 404 at first."""
    attachment = ExoAttachment(URL, Wish(model_id=MODEL))
    attachment.instance_id = "late"
    asked = _drive(attachment.end(), {"DELETE": [404, 404, 200], "GET": [200, 200, 200]})
    assert asked == ["DELETE", "GET", "DELETE", "GET", "DELETE", "GET"]
    assert attachment.instance_id is None


def test_nothing_taken_is_nothing_given_back() -> None:
    assert list(ExoAttachment(URL, Wish(model_id=MODEL)).end()) == []


# The plan


def _probe(nodes: dict[str, float], gib: float = 4.0) -> Probe:
    memory = {
        name: {"ramTotal": {"inBytes": 64 * GIB}, "ramAvailable": {"inBytes": int(free * GIB)}}
        for name, free in nodes.items()
    }
    names = {name: {"friendlyName": name, "chipId": "Apple M2"} for name in nodes}
    state = {"topology": {"nodes": list(nodes)}, "nodeIdentities": names, "nodeMemory": memory}
    models = {"data": [{"id": MODEL, "storage_size_megabytes": int(gib * 1024), "context_length": 32768}]}
    outputs = {"/node_id": '"node"', "/state": json.dumps(state), "/models": json.dumps(models)}
    return Probe(executable=URL, origin="running", outputs=outputs)


def _plan(request: Request, nodes: dict[str, float], gib: float = 4.0, gpus: tuple[Gpu, ...] = ()) -> Plan:
    job = Exo().job(named_model(MODEL, "safetensors"), request, Exo().installed(_probe(nodes, gib)))
    assert isinstance(job, Remote)
    return attach_plan(request, Rig(name="here", source="detected", gpus=gpus), job)


def _verdict(plan: Plan, rule: str) -> str:
    return next(one.verdict for one in plan.rules if one.id == rule)


def test_a_cluster_is_listed_and_its_model_sized() -> None:
    plan = _plan(Request(), {"a": 40, "b": 20})
    assert plan.attached == "the Exo cluster at http://127.0.0.1:52415: 2 nodes (a, b), 60.0 of 128.0 GiB free"
    assert (plan.placement, plan.ctx, plan.refusal) == ("attach", 32768, None)
    assert _verdict(plan, "fits-one-card") == "applies"


@given(st.lists(st.integers(0, 64), min_size=1, max_size=4), st.integers(1, 200))
def test_what_the_nodes_hold_together_is_not_refused(frees: list[int], gib: int) -> None:
    plan = _plan(Request(), {f"n{i}": free for i, free in enumerate(frees)}, gib)
    fits = sum(frees) >= gib
    assert (plan.refusal is None) is (fits or not sum(frees))  # memory that is not told cannot refuse
    if plan.refusal is not None:
        assert (plan.refusal.exit_code, plan.refusal.hint != "") == (5, True)


@pytest.mark.parametrize(
    ("split", "force", "nodes", "gib", "code"),
    [
        ("pipeline", False, {"a": 40, "b": 40}, 10, 3),
        ("pipeline", True, {"a": 40, "b": 40}, 10, None),
        ("tensor", False, {"a": 40}, 10, 5),
        ("none", False, {"a": 40, "b": 40}, 60, 5),
        ("none", False, {"a": 40, "b": 40}, 30, None),
        ("tensor", False, {"a": 40, "b": 40}, 60, None),
    ],
)
def test_splits_asked_for(split: Any, force: bool, nodes: dict[str, float], gib: float, code: int | None) -> None:
    refusal = _plan(Request(split=split, force=force), nodes, gib).refusal
    assert (refusal.exit_code if refusal else None) == code


def _card(free: int) -> Gpu:
    return Gpu(index=0, name="NVIDIA GeForce RTX 3090", vendor="nvidia", total_bytes=24 * GIB, free_bytes=free)


@pytest.mark.parametrize(("free", "verdict"), [(23 * GIB, "warns"), (2 * GIB, "passes")])
def test_a_local_card_that_would_do_is_named(free: int, verdict: str) -> None:
    assert _verdict(_plan(Request(), {"a": 40}, 4, (_card(free),)), "network-last") == verdict


def test_options_without_effect_are_said() -> None:
    request = Request(gpus=("0",), kv_type="q8_0", ctx=4096, users=3, split="none")
    warnings = _plan(request, {"a": 40}).warnings
    assert warnings[0].endswith("--gpus, --kv-type, --ctx, --users without effect")
    assert len(_plan(Request(), {"a": 40}).warnings) == 1  # that anybody can use it


@pytest.mark.parametrize(
    ("split", "sharding", "min_nodes"), [("auto", "Pipeline", 1), ("pipeline", "Pipeline", 2), ("tensor", "Tensor", 2)]
)
def test_the_request_by_hand(split: Any, sharding: str, min_nodes: int) -> None:
    job = Exo().job(named_model(MODEL, "safetensors"), Request(split=split), Exo().assumed())
    nothing = Layout(gpus=(), counts=(), shape=Shape(n_devices=0))
    rig = Rig(name="here", source="detected", gpus=())
    command = job.command(nothing, rig, Endpoint(host="127.0.0.1", port=8080))
    body = json.loads(command.argv[command.argv.index("-d") + 1])
    assert body == {
        "model_id": MODEL,
        "sharding": sharding,
        "instance_meta": "MlxRing",
        "min_nodes": min_nodes,
    }
    assert command.argv[-1] == f"{URL}/place_instance"
    assert command.endpoint == f"{URL}/v1"


@pytest.mark.parametrize("text", ["", "null", "[]", '"x"', '{"topology": 3}', '{"nodeMemory": {"a": 1}}', "<html>"])
def test_a_state_of_another_kind_is_another_service(text: str) -> None:
    with pytest.raises(RuntimeMissingError):
        Exo().installed(Probe(executable=URL, origin="running", outputs={"/node_id": '"n"', "/state": text}))
