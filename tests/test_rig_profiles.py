from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from mgpu.errors import ProfileError
from mgpu.request import RUNTIME_NAMES
from mgpu.rig import Gpu, Link, Pcie, Rig
from mgpu.units import GIB, MIB
from mgpu_profiles.document import FORMS, TABLES, check_name
from mgpu_profiles.rigs import format_rig, idle_free_bytes, parse_rig
from mgpu_profiles.store import BUNDLED

#: The contract's example, with a second card for the link to lead to.
HOME: Final = """\
schema = 1
name = "home"
[host]
ram_gib = 64
ram_bandwidth_gbs = 80        # optional
psu_watts = 1200
[[gpu]]
name = "NVIDIA GeForce RTX 3090"
uuid = "GPU-…"
vram_mib = 24576
free_mib = 24100
bandwidth_gbs = 936
pcie = "4.0 x16"
reserve_mib = 0
enabled = true
[[gpu]]
name = "NVIDIA GeForce RTX 3060"
uuid = "GPU-b"
vram_mib = 12288
pcie = "3.0 x4"
reserve_mib = 512
enabled = false
[[link]]
gpus = [1, 0]
kind = "pcie-p2p"
"""

#: A figure of `mgpu bench` below it.
MEASURED: Final = """
[[measured]]
model = "Llama 3.1 8B Instruct"
architecture = "llama"
quantization = "Q4_K_M"
weights_bytes = 4912898304
runtime = "llama.cpp"
version = "b11434"
mode = "pipeline"
gpus = [0, 1]
counts = [20, 13]
kv_type = "f16"
depth = 576
tok_s = 98.5
predicted = 97.25
date = "2026-11-23"
"""


def edited(old: str, new: str) -> str:
    assert HOME.count(old) == 1, old
    return HOME.replace(old, new)


def refusal(text: str) -> ProfileError:
    with pytest.raises(ProfileError) as caught:
        parse_rig(text, "home.toml")
    return caught.value


def takes(key: str) -> str:
    """What an error says that "gpu[1].vram_mib" takes."""
    return FORMS[re.sub(r"\[\d+\]", "", key)]


class TestParse:
    def test_everything_said(self) -> None:
        assert parse_rig(HOME, "home.toml") == Rig(
            name="home",
            source="profile",
            gpus=(
                Gpu(
                    index=0,
                    name="NVIDIA GeForce RTX 3090",
                    vendor="nvidia",
                    total_bytes=24576 * MIB,
                    free_bytes=24100 * MIB,
                    uuid="GPU-…",
                    bandwidth_bytes_per_s=936 * 10**9,
                    pcie=Pcie(gen=4, width=16),
                    compute_capability="8.6",
                    power_limit_watts=350,
                ),
                Gpu(
                    index=1,
                    name="NVIDIA GeForce RTX 3060",
                    vendor="nvidia",
                    total_bytes=12288 * MIB,
                    free_bytes=idle_free_bytes(12288 * MIB),
                    uuid="GPU-b",
                    bandwidth_bytes_per_s=360 * 10**9,
                    pcie=Pcie(gen=3, width=4),
                    compute_capability="8.6",
                    reserve_bytes=512 * MIB,
                    enabled=False,
                    power_limit_watts=170,
                ),
            ),
            links=(Link(gpus=(0, 1), kind="pcie-p2p"),),
            ram_bytes=64 * GIB,
            ram_free_bytes=60 * GIB,
            ram_bandwidth_bytes_per_s=80 * 10**9,
            psu_watts=1200,
        )

    def test_the_name_fills_in_what_is_left_out(self) -> None:
        text = 'schema = 1\nname = "x"\nhost.ram_gib = 8\n[[gpu]]\nname = "Radeon RX 7900 XTX"\nvram_mib = 24560'
        (gpu,) = parse_rig(text, "x.toml").gpus
        assert gpu.vendor == "amd"
        assert gpu.bandwidth_bytes_per_s == 960 * 10**9
        assert gpu.pcie == Pcie(gen=4, width=16)
        assert gpu.compute_capability == "gfx1100"
        assert gpu.power_limit_watts == 355

    @pytest.mark.parametrize(
        ("name", "vendor"),
        [
            ("NVIDIA CMP 170HX", "nvidia"),
            ("GeForce GT 730", "nvidia"),
            ("AMD Radeon Graphics (RADV RAPHAEL_MENDOCINO)", "amd"),
            ("Intel(R) UHD Graphics 770", "intel"),
            ("Apple M99", "apple"),
            ("llvmpipe (LLVM 15.0.6, 256 bits)", "unknown"),
        ],
    )
    def test_a_card_without_figures_has_a_vendor(self, name: str, vendor: str) -> None:
        (gpu,) = parse_rig(edited_gpu(name), "x.toml").gpus
        assert gpu.vendor == vendor
        assert gpu.bandwidth_bytes_per_s is None
        assert gpu.pcie is None

    def test_the_file_wins_over_the_table(self) -> None:
        text = edited("bandwidth_gbs = 936", 'bandwidth_gbs = 912.4\ncompute_capability = "9.9"\npower_watts = 280')
        gpu = parse_rig(text, "home.toml").gpus[0]
        assert gpu.bandwidth_bytes_per_s == 912_400 * 10**6
        assert gpu.compute_capability == "9.9"
        assert gpu.power_limit_watts == 280

    def test_a_small_machine_keeps_a_quarter_of_its_ram(self) -> None:
        rig = parse_rig(edited("ram_gib = 64", "ram_gib = 8"), "home.toml")
        assert rig.ram_free_bytes == 6 * GIB

    @given(total=st.integers(min_value=1, max_value=1 << 22).map(lambda mib: mib * MIB))
    def test_an_idle_card_is_almost_free(self, total: int) -> None:
        free = idle_free_bytes(total)
        assert 0 <= free < total
        assert free % MIB == 0
        assert total - free <= min(total * 0.02, 640 * MIB) + MIB


def edited_gpu(name: str) -> str:
    gpu = {"name": name, "vram_mib": 2048}
    return tomli_w.dumps({"schema": 1, "name": "x", "host": {"ram_gib": 16}, "gpu": [gpu]})


class TestRefuse:
    """Every refusal is one line with the file, the exact key, the value, and what the key takes."""

    @pytest.mark.parametrize(
        ("old", "new", "key", "value"),
        [
            ("schema = 1", "schema = 2", "schema", "2"),
            ("schema = 1", 'schema = "1"', "schema", "'1'"),
            ('name = "home"', 'name = ""', "name", "''"),
            ('name = "home"', 'name = "../home"', "name", "'../home'"),
            ('name = "home"', 'name = ".home"', "name", "'.home'"),
            ('name = "home"', 'name = "home.toml"', "name", "'home.toml'"),
            ('name = "home"', 'name = "ho me"', "name", "'ho me'"),
            ('name = "home"', f'name = "{"h" * 65}"', "name", "hhh..."),
            ("ram_gib = 64", 'ram_gib = "64"', "host.ram_gib", "'64'"),
            ("ram_gib = 64", "ram_gib = -1", "host.ram_gib", "-1"),
            ("ram_gib = 64", "ram_gib = nan", "host.ram_gib", "nan"),
            ("ram_gib = 64", "ram_gib = inf", "host.ram_gib", "inf"),
            ("ram_gib = 64", "ram_gib = true", "host.ram_gib", "true"),
            ("ram_bandwidth_gbs = 80 ", "ram_bandwidth_gbs = 0 ", "host.ram_bandwidth_gbs", "0"),
            ("psu_watts = 1200", "psu_watts = 1200.5", "host.psu_watts", "1200.5"),
            ("psu_watts = 1200", "cores = 0", "host.cores", "0"),
            ("[host]", "[[host]]", "host", "[{'ram_gib': 64"),
            ("vram_mib = 24576", "vram_mib = 24576.0", "gpu[0].vram_mib", "24576.0"),
            ("vram_mib = 12288", 'vram_mib = "12G"', "gpu[1].vram_mib", "'12G'"),
            ("vram_mib = 12288", "vram_mib = 0", "gpu[1].vram_mib", "0"),
            ("vram_mib = 12288", "vram_mib = -12288", "gpu[1].vram_mib", "-12288"),
            ("vram_mib = 24576", "vram_mib = 25769803776", "gpu[0].vram_mib", "25769803776"),  # bytes
            ("vram_mib = 24576", f"vram_mib = 1{'0' * 40}", "gpu[0].vram_mib", f"1{'0' * 40}"),
            ("free_mib = 24100", "free_mib = 24577", "gpu[0].free_mib", "24577"),
            ("free_mib = 24100", "free_mib = -1", "gpu[0].free_mib", "-1"),
            ("reserve_mib = 512", "reserve_mib = 12289", "gpu[1].reserve_mib", "12289"),
            ("reserve_mib = 512", "reserve_mib = 2026-11-23", "gpu[1].reserve_mib", "2026-11-23"),
            ("bandwidth_gbs = 936", "bandwidth_gbs = -936", "gpu[0].bandwidth_gbs", "-936"),
            ('pcie = "4.0 x16"', "pcie = 4", "gpu[0].pcie", "4"),
            ('pcie = "4.0 x16"', 'pcie = "x16"', "gpu[0].pcie", "'x16'"),
            ('pcie = "4.0 x16"', 'pcie = "4.0 x3"', "gpu[0].pcie", "'4.0 x3'"),
            ('pcie = "4.0 x16"', 'pcie = "4.0 x16\\n"', "gpu[0].pcie", r"'4.0 x16\n'"),
            ("enabled = true", "enabled = 1", "gpu[0].enabled", "1"),
            ("enabled = true", 'enabled = "yes"', "gpu[0].enabled", "'yes'"),
            ("enabled = true", 'vendor = "nvida"', "gpu[0].vendor", "'nvida'"),
            ("enabled = true", "compute_capability = 8.6", "gpu[0].compute_capability", "8.6"),
            ('name = "NVIDIA GeForce RTX 3060"', 'name = " "', "gpu[1].name", "' '"),
            ('name = "NVIDIA GeForce RTX 3060"', "name = 3060", "gpu[1].name", "3060"),
            ('uuid = "GPU-b"', 'uuid = ""', "gpu[1].uuid", "''"),
            ('uuid = "GPU-b"', 'uuid = "GPU-…"', "gpu[1].uuid", "'GPU-…'"),  # a second time
            ("gpus = [1, 0]", "gpus = [0, 2]", "link[0].gpus", "[0, 2]"),
            ("gpus = [1, 0]", "gpus = [-1, 0]", "link[0].gpus", "[-1, 0]"),
            ("gpus = [1, 0]", "gpus = [1, 1]", "link[0].gpus", "[1, 1]"),
            ("gpus = [1, 0]", "gpus = [0]", "link[0].gpus", "[0]"),
            ("gpus = [1, 0]", "gpus = 1", "link[0].gpus", "1"),
            ("gpus = [1, 0]", 'gpus = [0, "b"]', "link[0].gpus[1]", "'b'"),
            ('"pcie-p2p"', '"nvlnk"', "link[0].kind", "'nvlnk'"),
            ('"pcie-p2p"', '"nvlink"\n[[link]]\ngpus = [0, 1]\nkind = "pcie"', "link[1].gpus", "[0, 1]"),
        ],
    )
    def test_value(self, old: str, new: str, key: str, value: str) -> None:
        error = refusal(edited(old, new))
        assert error.exit_code == 8
        assert "\n" not in error.message
        assert error.message.startswith(f"home.toml: {key} = ")
        assert value in error.message
        assert error.message.endswith(takes(key))
        assert key in error.hint

    @pytest.mark.parametrize(
        ("old", "key"),
        [
            ("schema = 1\n", "schema"),
            ('name = "home"\n', "name"),
            ("ram_gib = 64\n", "host.ram_gib"),
            ("vram_mib = 12288\n", "gpu[1].vram_mib"),
            ('name = "NVIDIA GeForce RTX 3090"\n', "gpu[0].name"),
            ('kind = "pcie-p2p"\n', "link[0].kind"),
        ],
    )
    def test_missing(self, old: str, key: str) -> None:
        error = refusal(edited(old, ""))
        assert error.message == f"home.toml: {key} is missing: {takes(key)}"

    def test_missing_host(self) -> None:
        assert refusal('schema = 1\nname = "x"').message == f"home.toml: host is missing: {takes('host')}"

    @pytest.mark.parametrize(
        ("old", "new", "table", "said"),
        [
            ("vram_mib = 12288", "vram = 12288", "gpu", "gpu[1].vram (did you mean vram_mib?)"),
            ("psu_watts = 1200", "psu_wats = 1200", "host", "host.psu_wats (did you mean psu_watts?)"),
            ("[[link]]", "[[links]]", "", "links (did you mean link?)"),
            ('kind = "pcie-p2p"', 'type = "nvlink"\nkind = "nvlink"', "link", "link[0].type"),
            ("enabled = true", '"a\\nb" = 1', "gpu", r"gpu[0].'a\nb'"),
            ("enabled = true", '"x` - at `$.gpu[7]" = 1', "gpu", "gpu[0].'x` - at `$.gpu[7]'"),
        ],
    )
    def test_unknown_key(self, old: str, new: str, table: str, said: str) -> None:
        error = refusal(edited(old, new))
        accepted = ", ".join(TABLES[table].__struct_fields__)
        assert error.message == f"home.toml: unknown key {said}: accepted are {accepted}"

    @pytest.mark.parametrize(
        ("text", "where"),
        [
            (edited("ram_gib = 64", "ram_gib 64"), "line 4, column 9"),
            (edited('pcie = "3.0 x4"', 'pcie = "3.0'), "line 20, column 12"),
            (HOME + "[host]\n", "Cannot declare ('host',) twice"),
            ("a = " + "[" * 100_000, ""),
            ("a = " + "1" * 5_000, "line 1 has more than 2000 characters"),
            ("\x00", "line 1, column 1"),
        ],
        ids=["no equals", "open string", "twice", "deep", "digits", "nul"],
    )
    def test_not_toml(self, text: str, where: str) -> None:
        error = refusal(text)
        assert error.message.startswith("home.toml: not TOML: ")
        assert "\n" not in error.message
        assert where in error.message

    @pytest.mark.parametrize("name", ["", ".", "..", "-x", "a/b", "a b", "a\n", "x.toml", "é", "h" * 65])
    def test_names_unfit_for_a_file(self, name: str) -> None:
        with pytest.raises(ProfileError, match="not a profile name") as caught:
            check_name(name)
        assert repr(name) in caught.value.message

    def test_every_key_says_what_it_takes(self) -> None:
        keys = {
            f"{table}.{field}".lstrip(".") for table, struct in TABLES.items() for field in struct.__struct_fields__
        }
        assert keys == FORMS.keys()

    @pytest.mark.parametrize("key", [key for key in FORMS if key not in {"host", "gpu", "link", "measured"}])
    def test_what_it_says_is_accepted(self, key: str) -> None:
        """Whoever follows the advice of an error must not meet the next one."""
        table, _, field = key.rpartition(".")
        examples = re.findall(rf'{field} = (?:"[^"]*"|\[[^\]]*\]|[\w.]+)', FORMS[key]) or [
            f'{field} = "{word}"' for word in re.findall(r"[\w.-]+(?=,|$)", FORMS[key].partition("one of ")[2])
        ]
        if not examples:
            assert key == "gpu.uuid"
        for example in examples:
            data: dict[str, Any] = tomllib.loads(HOME + MEASURED)
            place = data if not table else data[table] if table == "host" else data[table][0]
            place.update(tomllib.loads(example))
            parse_rig(tomli_w.dumps(data), "home.toml")


NAMES: Final = [
    "NVIDIA GeForce RTX 3090",
    "NVIDIA GeForce RTX 4060 Ti",
    "NVIDIA GB10",
    "AMD Radeon RX 7900 XTX",
    "Apple M3 Max",
    "llvmpipe (LLVM 15.0.6, 256 bits)",
]
mib = st.integers(min_value=1, max_value=1 << 22)
gbs = st.floats(min_value=0.001, max_value=100_000) | st.integers(min_value=1, max_value=100_000)
watts = st.integers(min_value=1, max_value=1_000_000)
printable = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1).filter(lambda text: text.strip() != "")
words = st.text("abcdefGPU-0123456789…é", min_size=1)


@st.composite
def gpu_tables(draw: st.DrawFn) -> dict[str, Any]:
    vram = draw(mib)
    sizes = st.integers(min_value=0, max_value=vram)
    optional: dict[str, st.SearchStrategy[Any]] = {
        "free_mib": sizes,
        "reserve_mib": sizes,
        "bandwidth_gbs": gbs,
        "pcie": st.sampled_from(["1.0 x1", "3.0 x4", "4.0 x16", "5.0 x8", "6.0 x2"]),
        "enabled": st.booleans(),
        "vendor": st.sampled_from(["nvidia", "amd", "intel", "apple", "unknown"]),
        "compute_capability": st.sampled_from(["5.2", "8.6", "12.0", "gfx90a", "gfx1100"]),
        "power_watts": watts,
        "unified": st.booleans(),
        "integrated": st.booleans(),
        "display": st.booleans(),
        "numa_node": st.integers(min_value=0, max_value=1024),
        "device": words,
        "max_tensor_mib": mib,
    }
    table = draw(st.fixed_dictionaries({"name": st.sampled_from(NAMES) | printable}, optional=optional))
    return {"vram_mib": vram, **table}


@st.composite
def measured_tables(draw: st.DrawFn, n_gpus: int) -> dict[str, Any]:
    gpus = draw(st.permutations(range(n_gpus)))[: draw(st.integers(min_value=0, max_value=n_gpus))]
    counts = st.integers(min_value=0, max_value=200)
    speeds = st.floats(min_value=0.001, max_value=100_000) | st.integers(min_value=1, max_value=100_000)
    optional: dict[str, st.SearchStrategy[Any]] = {
        "host_layers": counts,
        "host_experts": counts,
        "prompt_tok_s": speeds,
        "predicted": speeds,
    }
    required: dict[str, st.SearchStrategy[Any]] = {
        "model": printable,
        "architecture": st.sampled_from(["llama", "gpt-oss", "qwen3moe"]),
        "quantization": st.sampled_from(["Q4_K_M", "Q4_K - Medium", "MXFP4"]),
        "weights_bytes": st.integers(min_value=1, max_value=1 << 45),
        "runtime": st.sampled_from(RUNTIME_NAMES),
        "version": st.sampled_from(["b11434", "0.6.0-dev (build 11434)", "unknown"]),
        "mode": st.sampled_from(["pipeline", "tensor"]),
        "kv_type": st.sampled_from(["f16", "q8_0", "q8_0/f16"]),
        "depth": counts,
        "tok_s": speeds,
        "date": st.sampled_from(
            ["2026-11-23", "2026-11-23T17:33", "2026-11-23T17:33:41Z", "2026-11-23T17:33:41+01:00"]
        ),
    }
    table = draw(st.fixed_dictionaries(required, optional=optional))
    return {**table, "gpus": list(gpus), "counts": [draw(counts) for _ in gpus]}


@st.composite
def profiles(draw: st.DrawFn) -> dict[str, Any]:
    gpus = draw(st.lists(gpu_tables(), max_size=4))
    uuids = draw(st.lists(words, min_size=len(gpus), max_size=len(gpus), unique=True))
    for gpu, uuid in zip(gpus, uuids, strict=True):
        if draw(st.booleans()):
            gpu["uuid"] = uuid
    pairs = [[a, b] for a in range(len(gpus)) for b in range(a)]
    links = draw(st.lists(st.sampled_from(pairs), unique_by=tuple)) if pairs else []
    kinds = st.sampled_from(["nvlink", "pcie-p2p", "pcie"])
    paths = st.sampled_from(["PIX", "PXB", "PHB", "NODE", "SYS"])
    ways = st.fixed_dictionaries({}, optional={"n_links": st.integers(min_value=1, max_value=36), "path": paths})
    host = st.fixed_dictionaries(
        {"ram_gib": st.floats(min_value=0, max_value=1 << 16) | st.integers(min_value=0, max_value=1 << 16)},
        optional={"ram_bandwidth_gbs": gbs, "cores": st.integers(min_value=1, max_value=512), "psu_watts": watts},
    )
    figures = [draw(measured_tables(len(gpus))) for _ in range(draw(st.integers(min_value=0, max_value=2)))]
    return {
        "schema": 1,
        "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_+-]{0,30}", fullmatch=True)),
        "host": draw(host),
        "gpu": gpus,
        "link": [{"gpus": pair, "kind": draw(kinds), **draw(ways)} for pair in links],
        "measured": figures,
    }


class TestRoundTrip:
    @given(profile=profiles())
    def test_nothing_of_a_profile_is_lost(self, profile: dict[str, Any]) -> None:
        rig = parse_rig(tomli_w.dumps(profile), "first.toml")
        text = format_rig(rig)
        assert parse_rig(text, "second.toml") == rig
        assert format_rig(parse_rig(text, "second.toml")) == text

    @given(
        total=st.integers(min_value=MIB, max_value=1 << 42),
        share=st.floats(min_value=0, max_value=1),
        ram=st.integers(min_value=0, max_value=1 << 46),
        bandwidth=st.integers(min_value=10**6, max_value=10**14),
    )
    def test_a_detected_rig_is_rounded_down(self, total: int, share: float, ram: int, bandwidth: int) -> None:
        gpu = Gpu(
            index=3,  # what NVML calls it: cards 0 to 2 could not be read
            name="NVIDIA GeForce RTX 3090",
            vendor="nvidia",
            total_bytes=total,
            free_bytes=min(int(total * share), total),
            bandwidth_bytes_per_s=bandwidth,
            pci_bus_id="00000000:01:00.0",
            processes=("4242 python (3.1 GiB)",),
        )
        rig = Rig(name="found", source="detected", gpus=(gpu,), ram_bytes=ram, driver="NVIDIA 580.95.05")
        back = parse_rig(format_rig(rig), "found.toml")
        assert back.source == "profile"
        assert back.ram_bytes == ram // MIB * MIB
        assert back.gpus[0].index == 0
        assert back.gpus[0].total_bytes == total // MIB * MIB
        assert back.gpus[0].free_bytes == gpu.free_bytes // MIB * MIB
        bandwidth_back = back.gpus[0].bandwidth_bytes_per_s
        assert bandwidth_back is not None
        assert abs(bandwidth_back - bandwidth) <= 500_000

    def test_links_follow_their_cards(self) -> None:
        rig = parse_rig(HOME, "home.toml")
        moved = msgspec.structs.replace(
            rig,
            gpus=tuple(msgspec.structs.replace(gpu, index=gpu.index + 2) for gpu in rig.gpus),
            links=(Link(gpus=(2, 3), kind="nvlink", n_links=4), Link(gpus=(0, 3), kind="pcie-p2p")),
        )
        assert parse_rig(format_rig(moved), "moved.toml").links == (Link(gpus=(0, 1), kind="nvlink", n_links=4),)

    def test_where_a_card_hangs_is_kept(self) -> None:
        card = Gpu(index=0, name="AMD X", vendor="amd", total_bytes=GIB, free_bytes=GIB, numa_node=0)
        graphics = msgspec.structs.replace(card, index=1, numa_node=None, integrated=True, unified=True, enabled=False)
        gpus = (card, graphics)
        link = Link(gpus=(0, 1), kind="pcie", path="SYS")
        rig = Rig(name="found", source="profile", gpus=gpus, links=(link,), ram_bytes=GIB, ram_free_bytes=GIB * 3 // 4)
        assert parse_rig(format_rig(rig), "found.toml") == rig

    def test_what_a_person_reads(self) -> None:
        text = edited("ram_gib = 64", "ram_gib = 62.7").replace("free_mib = 24100\n", "").replace('"GPU-…"', '"GPU-a"')
        assert (
            format_rig(parse_rig(text, "home.toml"))
            == """\
schema = 1
name = "home"

[host]
ram_gib = 62.7
ram_bandwidth_gbs = 80
psu_watts = 1200

[[gpu]]
name = "NVIDIA GeForce RTX 3090"
uuid = "GPU-a"
vram_mib = 24576
free_mib = 24084
bandwidth_gbs = 936
pcie = "4.0 x16"
reserve_mib = 0
enabled = true
compute_capability = "8.6"
power_watts = 350

[[gpu]]
name = "NVIDIA GeForce RTX 3060"
uuid = "GPU-b"
vram_mib = 12288
free_mib = 12042
bandwidth_gbs = 360
pcie = "3.0 x4"
reserve_mib = 512
enabled = false
compute_capability = "8.6"
power_watts = 170

[[link]]
gpus = [0, 1]
kind = "pcie-p2p"
"""
        )


def answer(text: str) -> str | None:
    """What is wrong with the profile, if anything is."""
    try:
        parse_rig(text, "odd.toml")
    except ProfileError as error:
        return error.message
    return None


class TestAnything:
    """Whatever a file holds, the answer is a rig or one clear line."""

    @given(text=st.text())
    def test_text(self, text: str) -> None:
        assert "\n" not in refusal(text).message

    @given(
        profile=profiles(),
        key=st.sampled_from(sorted(FORMS)),
        value=st.recursive(
            st.integers() | st.floats() | st.booleans() | st.text() | st.dates() | st.sampled_from([0, 1, -1, 0.0]),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=5,
        ),
        odd_key=st.none() | st.text(),
    )
    def test_values(self, profile: dict[str, Any], key: str, value: Any, odd_key: str | None) -> None:
        table, _, field = key.rpartition(".")
        place = profile if not table else profile[table]
        place = place[0] if isinstance(place, list) and place else place
        if isinstance(place, dict):
            place[field if odd_key is None else odd_key] = value
        message = answer(tomli_w.dumps(profile))
        assert message is None or message.startswith("odd.toml: ")
        assert message is None or ("\n" not in message and len(message) < 600)


CARD: Final = {
    "3090": ("NVIDIA GeForce RTX 3090", 24576, 936),
    "3060": ("NVIDIA GeForce RTX 3060", 12288, 360),
    "4090": ("NVIDIA GeForce RTX 4090", 24564, 1008),
    "4060ti": ("NVIDIA GeForce RTX 4060 Ti", 16380, 288),
    "7900xtx": ("AMD Radeon RX 7900 XTX", 24560, 960),
    "m3-max": ("Apple M3 Max", 49152, 400),
    "h200": ("NVIDIA H200", 143771, 4800),
}
CARDS: Final = {
    "3090": ["3090"],
    "2x3090": ["3090"] * 2,
    "2x3090-nvlink": ["3090"] * 2,
    "3060": ["3060"],
    "2x3060": ["3060"] * 2,
    "4x3060": ["3060"] * 4,
    "3090+3060": ["3090", "3060"],
    "4090": ["4090"],
    "2x4090": ["4090"] * 2,
    "4060ti-16": ["4060ti"],
    "4x3090": ["3090"] * 4,
    "8x3090": ["3090"] * 8,
    "cpu-only": [],
    "m3-max-64": ["m3-max"],
    "7900xtx": ["7900xtx"],
    "h200": ["h200"],
}


def bundled(name: str) -> Rig:
    return parse_rig((BUNDLED / f"{name}.toml").read_text(encoding="utf-8"), name)


class TestBundled:
    def test_all_of_them(self) -> None:
        assert {path.stem for path in BUNDLED.iterdir()} == CARDS.keys()

    @pytest.mark.parametrize(("name", "cards"), CARDS.items())
    def test_cards(self, name: str, cards: list[str]) -> None:
        rig = bundled(name)
        assert rig.name == name
        found = [(gpu.name, gpu.total_bytes, gpu.bandwidth_bytes_per_s) for gpu in rig.gpus]
        assert found == [(card, vram * MIB, gb * 10**9) for card, vram, gb in map(CARD.__getitem__, cards)]
        assert [gpu.index for gpu in rig.gpus] == list(range(len(cards)))

    @pytest.mark.parametrize("name", CARDS)
    def test_is_fit_to_plan_with(self, name: str) -> None:
        rig = bundled(name)
        assert rig.ram_bytes > rig.ram_free_bytes > 0
        assert rig.ram_bandwidth_bytes_per_s is not None
        assert parse_rig(format_rig(rig), name) == rig
        for gpu in rig.gpus:
            assert gpu.vendor != "unknown"
            assert gpu.unified == (gpu.vendor == "apple")
            assert (gpu.pcie is None) == gpu.unified

    @pytest.mark.parametrize("name", CARDS)
    def test_the_supply_carries_the_cards(self, name: str) -> None:
        """Board limits and 150 W for the rest: a bundled rig should not warn of its own supply."""
        rig = bundled(name)
        if rig.psu_watts is not None:
            assert rig.psu_watts >= sum(gpu.power_limit_watts or 0 for gpu in rig.gpus) + 150

    def test_only_one_has_a_bridge(self) -> None:
        linked = {name: bundled(name).links for name in CARDS if bundled(name).links}
        assert linked == {"2x3090-nvlink": (Link(gpus=(0, 1), kind="nvlink", n_links=4),)}

    @pytest.mark.parametrize("path", sorted(BUNDLED.iterdir()), ids=lambda path: path.stem)
    def test_says_what_it_stands_for(self, path: Path) -> None:
        assert path.read_text(encoding="utf-8").startswith("# ")


def test_a_slice_has_its_share_of_the_cards_bandwidth() -> None:
    name = "NVIDIA A100-SXM4-80GB MIG 1g.10gb"
    text = f'schema = 1\nname = "a"\n[host]\nram_gib = 64\n[[gpu]]\nname = "{name}"\nvram_mib = 10240\n'
    whole = text.replace(" MIG 1g.10gb", "").replace("10240", "81920")
    slice_of, card = (parse_rig(one, "test").gpus[0].bandwidth_bytes_per_s for one in (text, whole))
    assert slice_of is not None
    assert card is not None
    assert slice_of == card // 8
