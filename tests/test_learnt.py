"""What a launch that ran out of memory teaches the next plan: pure."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuda_house import GIB
from mgpu.decide.claims import HOST, Claim, card_key, with_claims
from mgpu.decide.learnt import Shortage, learnt, merged
from mgpu.plan import DeviceBytes, DevicePlan, Forecast, HostBytes, HostPlan, Layout, Plan, Shape
from mgpu.rig import Gpu, Rig

GPUS: Final = tuple(
    Gpu(index=i, name="RTX 3090", vendor="nvidia", total_bytes=24 * GIB, free_bytes=23 * GIB, uuid=f"GPU-{i}")
    for i in range(3)
)
KEYS: Final = {gpu.index: card_key(gpu) for gpu in GPUS}
RIG: Final = Rig(name="r", source="detected", gpus=GPUS, ram_bytes=64 * GIB, ram_free_bytes=60 * GIB)


def _plan(*totals: int, host: int = GIB, reserve: int = 0) -> Plan:
    devices = tuple(
        DevicePlan(
            gpu=index,
            name="RTX 3090",
            uuid=None,
            blocks=range(1),
            has_output=False,
            memory=DeviceBytes(weights=total - total // 10, kv=0, compute=0, overhead=total // 10),
            free_bytes=23 * GIB,
            reserve_bytes=reserve,
        )
        for index, total in enumerate(totals)
    )
    return Plan(
        placement="pipeline" if len(totals) > 1 else "single",
        runtime="llama.cpp",
        ctx=8192,
        users=1,
        kv_type="f16",
        layout=Layout(gpus=tuple(range(len(totals))), counts=(1,) * len(totals), shape=Shape(n_devices=len(totals))),
        devices=devices,
        host=HostPlan(
            blocks=range(0),
            expert_blocks=range(0),
            memory=HostBytes(weights=host, kv=0, compute=0),
            free_bytes=60 * GIB,
        ),
        tensor_split=None,
        forecast=Forecast(),
        rules=(),
    )


NAMES: Final = ("CUDA0", "CUDA1", "CUDA2")


def _shortage(short: set[str], held: int, wanted: int) -> Shortage:
    return Shortage(names=NAMES, short=short, held_bytes=held, wanted_bytes=wanted)


@given(
    totals=st.lists(st.integers(GIB // 4, 23 * GIB), min_size=1, max_size=3),
    short=st.sets(st.sampled_from([*NAMES, "ROCm0", "CPU"])),
    held=st.integers(0, 23 * GIB),
    wanted=st.integers(0, 40 * GIB),
    tries=st.integers(1, 3),
    reserve=st.integers(0, GIB),
)
def test_the_plan_that_failed_never_fits_again(
    totals: list[int], short: set[str], held: int, wanted: int, tries: int, reserve: int
) -> None:
    plan = _plan(*totals, reserve=reserve)
    claims = learnt(plan, _shortage(short, held, wanted), keys=KEYS, tries=tries)
    left = with_claims(RIG, claims)
    assert claims
    if "CPU" in short:
        assert left.ram_free_bytes < plan.host.memory.total
        assert left.gpus == RIG.gpus
        return
    for device, name in zip(plan.devices, NAMES, strict=False):
        now, before = left.gpus[device.gpu], RIG.gpus[device.gpu]
        if name in short or not short & set(NAMES[: len(totals)]):
            assert 0 < now.free_bytes - reserve < device.memory.total
        else:
            assert now == before


@pytest.mark.parametrize(
    ("held", "wanted", "most"),
    [
        pytest.param(14 * GIB, GIB, 16.2, id="the cache, beside the weights"),
        pytest.param(0, 17 * GIB, 18.1, id="the weights in one piece"),
        pytest.param(0, 2 * GIB, 19, id="a part of something that it does not tell"),
        pytest.param(0, 0, 19, id="it says nothing"),
        pytest.param(19 * GIB, 9 * GIB, 19, id="more than was planned"),
    ],
)
def test_what_it_asked_for_in_vain_bounds_what_there_was(held: int, wanted: int, most: float) -> None:
    """Planned: 18 GiB, and 2 GiB of overhead beside them."""
    plan = _plan(20 * GIB)
    (claim,) = learnt(plan, _shortage({"CUDA0"}, held, wanted), keys=KEYS, tries=1)
    assert claim.n_bytes == pytest.approx(most * GIB, rel=0.01)


def test_what_is_learnt_of_one_card_is_not_forgotten_for_another() -> None:
    first = (Claim(key="a", n_bytes=9, why="", leaves=True), Claim(key="b", n_bytes=9, why="", leaves=True))
    later = (Claim(key="b", n_bytes=5, why="", leaves=True),)
    assert {claim.key: claim.n_bytes for claim in merged(first, later)} == {"a": 9, "b": 5}


def test_a_limit_and_a_promise_on_the_same_card() -> None:
    """The limit is of what is free, promised or not."""
    claims = (
        Claim(key="GPU-0", n_bytes=10 * GIB, why="promised to a, which is loading"),
        Claim(key="GPU-0", n_bytes=20 * GIB, why="it ran out", leaves=True),
        Claim(key=HOST, n_bytes=2 * GIB, why="it ran out", leaves=True),
    )
    left = with_claims(RIG, claims)
    assert (left.gpus[0].free_bytes, left.ram_free_bytes) == (13 * GIB, 2 * GIB)
    assert [finding.text for finding in left.findings] == [
        "GPU 0: 10.0 GiB of it are promised to a, which is loading",
        "RAM: planned with 2.0 of 60.0 GiB, as it ran out",
    ]
