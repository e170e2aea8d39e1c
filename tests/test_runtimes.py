"""`mgpu runtimes`: what each could do on a rig and why not more, in 80 columns and as JSON."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from conftest import Mgpu, write_program
from decision_cases import RIGS, rig
from fakenvml.machine import Machine, rtx_3090
from mgpu.adapter import Installed
from mgpu.decide.abilities import abilities_on, only_usable
from mgpu.report.runtimes import Row, runtime_object, runtimes_screen
from mgpu.report.screen import console
from mgpu.rig import Pcie, Rig
from mgpu_adapters.registry import ADAPTER_NAMES, load_adapter
from mgpu_profiles.store import BUNDLED
from planning import card, rig_named, rig_of

BUNDLED_RIGS = sorted(path.stem for path in BUNDLED.glob("*.toml"))


def row(name: str, where: Rig, installed: Installed | None = None, **more: Any) -> Row:
    adapter = load_adapter(name)
    return Row(
        runtime=name,
        formats=tuple(sorted(adapter.formats)),
        abilities=adapter.abilities,
        installed=installed,
        missing="",
        install=adapter.search.install,
        here=abilities_on(adapter, where),
        **more,
    )


def shown(rows: list[Row], where: Rig, width: int = 80) -> str:
    out = io.StringIO()
    console(out, width=width).print(runtimes_screen(rows, where, width))
    return out.getvalue()


@pytest.mark.parametrize("name", [*BUNDLED_RIGS, *RIGS])
def test_holds_in_80_columns_and_leaves_nothing_unsaid(name: str) -> None:
    where = rig(name)
    rows = [row(name, where) for name in ADAPTER_NAMES]
    text = shown(rows, where)
    assert max(map(len, text.splitlines())) <= 80
    for one in rows:
        if not one.here.gpus and not one.abilities.cpu and not one.abilities.machines:
            assert one.here.why_not, f"{one.runtime} can do nothing on {name}, and does not say why"
        assert set(one.here.modes) <= set(one.abilities.modes)
        assert {gpu.index for gpu in where.gpus} >= set(one.here.gpus)


class TestHere:
    def test_matched_cards_with_a_link_that_pays(self) -> None:
        here = abilities_on(load_adapter("vllm"), rig("2x3090-nvlink"))
        assert here.gpus == (0, 1)
        assert set(here.modes) == {"pipeline", "tensor", "replicas"}
        assert here.why_not == ()

    def test_mixed_cards_have_no_tensor_ranks(self) -> None:
        here = abilities_on(load_adapter("vllm"), rig_named("3090+3060"))
        assert set(here.modes) == {"pipeline", "replicas"}
        assert here.why_not == ("no tensor ranks: cards of different memory",)

    def test_two_of_three_are_matched(self) -> None:
        slot = Pcie(gen=4, width=16)
        pair, third = (card(i, 24, 936, pcie=slot) for i in (0, 1)), card(2, 12, 360, pcie=slot)
        assert "tensor" in abilities_on(load_adapter("vllm"), rig_of(*pair, third)).modes

    def test_a_slow_slot_has_no_tensor_ranks(self) -> None:
        here = abilities_on(load_adapter("llama.cpp"), rig("2x3090-x1"))
        assert here.why_not == ("no tensor ranks: GPU 1 is in a PCIe 3.0 x1 slot",)

    def test_a_slow_link_has_no_tensor_ranks(self) -> None:
        here = abilities_on(load_adapter("llama.cpp"), rig("2x5060ti-16-gen3"))
        assert "tensor" not in here.modes
        assert "PCIe 3.0 x8 is too slow" in here.why_not[0]

    def test_an_old_card_is_named_with_its_figure(self) -> None:
        cards = (card(0, 24, 936, compute_capability="8.6"), card(1, 24, 347, compute_capability="6.1"))
        here = abilities_on(load_adapter("vllm"), rig_of(*cards))
        assert here.gpus == (0,)
        assert here.modes == ()
        assert "GPU 1" in here.why_not[0]
        assert "7.0" in here.why_not[0]
        assert "6.1" in here.why_not[0]

    def test_a_build_that_lists_fewer_cards(self) -> None:
        where = rig_named("2x3090")
        bound = replace(where, gpus=(where.gpus[0], replace(where.gpus[1], enabled=False)))
        here = abilities_on(load_adapter("llama.cpp"), where, bound)
        assert here.gpus == (0,)
        assert here.why_not == ("GPU 1 (RTX 3090): this build of it lists no such device",)

    def test_a_card_that_the_profile_disables_is_nobodys_fault(self) -> None:
        where = rig_named("2x3090")
        here = abilities_on(
            load_adapter("llama.cpp"), replace(where, gpus=(where.gpus[0], replace(where.gpus[1], enabled=False)))
        )
        assert here.gpus == (0,)
        assert here.why_not == ()

    def test_without_a_gpu(self) -> None:
        assert abilities_on(load_adapter("llama.cpp"), rig_named("cpu-only")).why_not == ()
        assert abilities_on(load_adapter("exllamav3"), rig_named("cpu-only")).why_not == ("it needs a GPU",)

    @given(st.lists(st.tuples(st.sampled_from([8, 12, 24]), st.sampled_from(["6.1", "7.5", "8.6", "9.0"])), max_size=6))
    def test_what_it_can_use_is_a_part_of_the_rig(self, cards: list[tuple[int, str]]) -> None:
        where = rig_of(*(card(i, gib, 500, compute_capability=cc) for i, (gib, cc) in enumerate(cards)))
        for name in ADAPTER_NAMES:
            adapter = load_adapter(name)
            here, usable = abilities_on(adapter, where), only_usable(adapter, where)
            enabled = tuple(gpu.index for gpu in usable.gpus if gpu.enabled)
            assert here.gpus == (() if adapter.abilities.machines else enabled)
            assert len(here.gpus) > 1 or not here.modes


class TestScreen:
    FOUND = Installed(
        runtime="llama.cpp",
        executable="/opt/llama.cpp/build/bin/llama-server",
        origin="PATH",
        version="0.6.0-dev of a version that nobody would believe (build 11434)",
        flags=frozenset(),
    )

    def test_a_version_that_is_cut_is_told_whole_below(self) -> None:
        text = shown([row("llama.cpp", rig_named("2x3090"), self.FOUND)], rig_named("2x3090"))
        assert "…" in text
        assert self.FOUND.version in " ".join(text.split())
        assert self.FOUND.executable in text

    def test_what_is_found_needs_no_install_command(self) -> None:
        where = rig_named("2x3090")
        assert "install:" not in shown([row("llama.cpp", where, self.FOUND)], where)
        assert "install: uv tool install vllm" in shown([row("vllm", where)], where)

    def test_what_cards_can_do_together_is_told(self) -> None:
        where = rig("2x3090-nvlink")
        assert "one card; several by layers, as tensor ranks or a replica on each" in " ".join(
            shown([row("vllm", where)], where).split()
        )

    def test_as_json(self) -> None:
        told = runtime_object(row("vllm", rig_named("3090+3060")))
        assert json.loads(json.dumps(told)) == told
        assert told["found"] is False
        assert told["why_not"] == "not installed"
        assert told["here"]["gpus"] == [0, 1]
        found = runtime_object(row("llama.cpp", rig_named("3090"), self.FOUND, devices=("CUDA0 RTX 3090",)))
        assert (found["found"], found["path"], found["devices"]) == (True, self.FOUND.executable, ["CUDA0 RTX 3090"])


_HELP = """--model FNAME
--device <dev1,dev2,..>
--tensor-split N0,N1,N2,...
--split-mode {none,layer,row,tensor}
--flash-attn [on|off|auto]
"""
_SERVER = """\
import sys
print({{"--version": "version: 0.6.0-dev (build 11434, commit 0123abc)", "--help": {help!r},
       "--list-devices": "Available devices:\\n{devices}"}}[sys.argv[1]])
"""


def _machine(fake_nvml: Path, tmp_path: Path, devices: str) -> dict[str, str]:
    config = tmp_path / "machine.toml"
    config.write_text(Machine(rtx_3090(0), rtx_3090(1)).toml(), encoding="utf-8")
    server = write_program(tmp_path / "llama-server", _SERVER.format(help=_HELP, devices=devices))
    return {
        "LD_LIBRARY_PATH": str(fake_nvml), "FAKE_NVML_CONFIG": str(config), "PATH": os.defpath,
        "MGPU_LLAMA_SERVER": str(server),
    }  # fmt: skip


def test_on_a_machine_with_two_cards(mgpu: Mgpu, fake_nvml: Path, tmp_path: Path) -> None:
    devices = "\\n".join(f"  CUDA{i}: NVIDIA GeForce RTX 3090 (24124 MiB, 23800 MiB free)" for i in range(2))
    env = _machine(fake_nvml, tmp_path, devices)
    told = json.loads(mgpu("runtimes", "--json", env=env).stdout)
    assert [one["runtime"] for one in told["runtimes"]] == list(ADAPTER_NAMES)
    ours = told["runtimes"][0]
    assert ours["version"] == "0.6.0-dev (build 11434)"
    assert ours["here"]["gpus"] == [0, 1]
    assert len(ours["devices"]) == 2
    text = mgpu("runtimes", env=env)
    assert text.returncode == 0
    assert "this machine: GPU 0 RTX 3090, GPU 1 RTX 3090" in text.stdout


def test_a_build_without_a_gpu_says_so(mgpu: Mgpu, fake_nvml: Path, tmp_path: Path) -> None:
    env = _machine(fake_nvml, tmp_path, "  (none)")
    ours = json.loads(mgpu("runtimes", "--json", env=env).stdout)["runtimes"][0]
    assert ours["found"]
    assert ours["here"]["gpus"] == []
    assert "lists no such device" in ours["here"]["why_not"][0]


def test_a_vllm_for_the_cpu_uses_no_card(mgpu: Mgpu, fake_nvml: Path, tmp_path: Path) -> None:
    vllm = write_program(tmp_path / "vllm", "print('0.32.0+cpu')")
    env = _machine(fake_nvml, tmp_path, "  (none)") | {"MGPU_VLLM": str(vllm)}
    told = next(
        one for one in json.loads(mgpu("runtimes", "--json", env=env).stdout)["runtimes"] if one["runtime"] == "vllm"
    )
    assert (told["version"], told["here"]["gpus"]) == ("0.32.0+cpu", [])
    assert told["here"]["why_not"] == ["it was built for the CPU alone"]


def test_one_that_is_broken_is_a_row_like_any_other(mgpu: Mgpu, tmp_path: Path) -> None:
    broken = write_program(tmp_path / "llama-server", "import sys; sys.exit('error while loading shared libraries')")
    done = mgpu("runtimes", "--json", env={"MGPU_LLAMA_SERVER": str(broken)})
    assert done.returncode == 0
    ours = json.loads(done.stdout)["runtimes"][0]
    assert ours["found"] is False
    assert "error while loading shared libraries" in ours["why_not"]
    assert ours["install"]


def test_a_rig_that_there_is_not(mgpu: Mgpu) -> None:
    assert mgpu("runtimes", "--rig", "nonsense").returncode == 8
