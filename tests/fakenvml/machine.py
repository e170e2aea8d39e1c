"""Machines with NVIDIA cards that do not exist: one description drives both FAKE drivers of this folder.

    system  driver_version, cuda_driver_version; init_error: what nvmlInit answers
    fail    C function -> the NVML return code it answers, for every card
    gpu     one per card: name, uuid, pci_bus_id, mem_total, mem_reserved, mem_used, pcie_gen, pcie_width, pcie_gen_max,
            pcie_width_max, pcie_gen_card (in the best of slots), compute_capability (86), power_limit_mw,
            mem_bus_width, mem_clock_max_mhz, display_active, handle_error, switch_links (NVLinks to a switch),
            idle_links (the first NVLinks, with nothing at their end), mig_mode, mig_max, proc_pid, proc_mem
            of the Python fake alone, too: persistence, power_default_mw, slowed (clock event reasons), bar1_total, ecc,
            ecc_errors, rows_pending, rows_failed
    mig     one per instance: gpu, slot, and keys as of a gpu
    link    one per pair: a, b, nvlinks, level (nvmlGpuTopologyLevel_t: 30 is PHB), and p2p, p2p_nvlink (what
            nvmlDeviceGetP2PStatus says for READ and for NVLINK)

A key that is absent is NotSupported; a value "!15" is the return code 15.
"""

from __future__ import annotations

Table = dict[str, int | str]


class Machine:
    """What the driver would find."""

    def __init__(
        self,
        *gpus: Table,
        links: tuple[Table, ...] = (),
        migs: tuple[Table, ...] = (),
        fail: dict[str, int] | None = None,
        init_error: int = 0,
    ) -> None:
        self.system: Table = {"driver_version": "580.95.05", "cuda_driver_version": 13000, "init_error": init_error}
        self.fail = fail or {}
        self.gpus = gpus
        self.links = links
        self.migs = migs

    def toml(self) -> str:
        """The description as `fakenvml.c` reads it."""
        tables: list[tuple[str, Table]] = [("[system]", self.system), ("[fail]", {**self.fail})]
        tables += [("[[gpu]]", gpu) for gpu in self.gpus]
        tables += [("[[mig]]", mig) for mig in self.migs]
        tables += [("[[link]]", link) for link in self.links]
        return "".join(f"{header}\n{_lines(table)}" for header, table in tables)


def _lines(table: Table) -> str:
    return "".join(
        f'{key} = "{value}"\n' if isinstance(value, str) else f"{key} = {value}\n" for key, value in table.items()
    )


def rtx_3090(number: int = 0, /, **changes: int | str) -> Table:
    """A GeForce RTX 3090 at idle. Memory and reserve as driver 580 shows them."""
    card: Table = {
        "name": "NVIDIA GeForce RTX 3090",
        "uuid": f"GPU-3090{number:04d}-aaaa-bbbb-cccc-000000000001",
        "pci_bus_id": f"00000000:{number + 1:02X}:00.0",
        "mem_total": 25_769_803_776,
        "mem_reserved": 381_681_664,
        "mem_used": 0,
        "pcie_gen": 1,
        "pcie_width": 16,
        "pcie_gen_max": 4,
        "pcie_width_max": 16,
        "compute_capability": 86,
        "power_limit_mw": 350_000,
        "mem_bus_width": 384,
        "mem_clock_max_mhz": 9751,
        "display_active": 0,
    }
    return card | changes


def tesla_p40(number: int = 0, **changes: int | str) -> Table:
    card: Table = {
        "name": "Tesla P40",
        "uuid": f"GPU-00400000-aaaa-bbbb-cccc-{number:012d}",
        "pci_bus_id": f"00000000:{number + 0x41:02X}:00.0",
        "mem_total": 24_152_899_584,
        "pcie_gen": 3,
        "pcie_width": 16,
        "pcie_gen_max": 3,
        "pcie_width_max": 16,
        "compute_capability": 61,
        "power_limit_mw": 250_000,
        "mem_bus_width": 384,
        "mem_clock_max_mhz": 3615,
    }
    return card | changes


def gb10(**changes: int | str) -> Table:
    """DGX Spark: no memory, clocks, bus width or power of its own to report."""
    card: Table = {
        "name": "NVIDIA GB10",
        "uuid": "GPU-cccccccc-0000-0000-0000-000000000010",
        "pci_bus_id": "0000000F:01:00.0",
        "compute_capability": 121,
    }
    return card | changes


def a100(number: int = 0, **changes: int | str) -> Table:
    card: Table = {
        "name": "NVIDIA A100-SXM4-40GB",
        "uuid": f"GPU-a1000000-aaaa-bbbb-cccc-{number:012d}",
        "pci_bus_id": f"00000000:{number + 7:02X}:00.0",
        "mem_total": 42_949_672_960,
        "mem_reserved": 629_145_600,
        "pcie_gen": 4,
        "pcie_width": 16,
        "pcie_gen_max": 4,
        "pcie_width_max": 16,
        "compute_capability": 80,
        "power_limit_mw": 400_000,
        "mem_bus_width": 5120,
        "mem_clock_max_mhz": 1215,
        "mig_mode": 0,
        "mig_max": 7,
    }
    return card | changes


def mig_instance(gpu: int, slot: int, **changes: int | str) -> Table:
    """A 3g.20gb instance of an A100."""
    instance: Table = {
        "gpu": gpu,
        "slot": slot,
        "name": "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "uuid": f"MIG-{slot:08d}-dddd-eeee-ffff-{gpu:012d}",
        "mem_total": 20_937_965_568,
        "mem_reserved": 0,
        "mem_used": 0,
    }
    return instance | changes


def h100(number: int = 0, **changes: int | str) -> Table:
    """An H100 SXM on an NVSwitch board: 18 NVLinks, all of them to switches."""
    card: Table = {
        "name": "NVIDIA H100 80GB HBM3",
        "uuid": f"GPU-11000000-aaaa-bbbb-cccc-{number:012d}",
        "pci_bus_id": f"00000000:{0x19 + 8 * number:02X}:00.0",
        "mem_total": 85_520_809_984,
        "mem_reserved": 645_922_816,
        "pcie_gen": 5,
        "pcie_width": 16,
        "pcie_gen_max": 5,
        "pcie_width_max": 16,
        "compute_capability": 90,
        "power_limit_mw": 700_000,
        "mem_bus_width": 5120,
        "mem_clock_max_mhz": 2619,
        "switch_links": 18,
    }
    return card | changes
