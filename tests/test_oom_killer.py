"""Killed by the kernel for want of RAM: seen by its counters, and said."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cuda_house import CudaHouse
from launching import wait_for
from mgpu.errors import OutOfMemoryError, RuntimeFailedError
from mgpu.launch.oom_killer import has_killed, kills
from mgpu.launch.process import Child
from mgpu.launch.watch import Watch
from mgpu_adapters.llamacpp.adapter import LlamaCpp


@pytest.fixture
def house(tmp_path: Path, python_path: str, fake_nvml: Path, header: Callable[[str], Path]) -> Iterator[CudaHouse]:
    """One card of 24 GiB."""
    house = CudaHouse(tmp_path, python_path, fake_nvml, header)
    house.has(24)
    yield house
    house.close()


class TestTheKernel:
    """A process that the kernel has killed for want of RAM cannot say so; the kernel keeps count."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text("9:name=systemd:/\n0::/user.slice/mgpu.service\n")
        (tmp_path / "proc/vmstat").write_text("nr_free_pages 123\noom_kill 7\nunevictable_pgs 0\n")
        group = tmp_path / "sys/fs/cgroup/user.slice/mgpu.service"
        group.mkdir(parents=True)
        (group / "memory.events").write_text("low 0\noom 3\noom_kill 3\noom_group_kill 0\n")
        return tmp_path

    def test_counters(self, root: Path) -> None:
        assert kills(root) == (7, 3)
        assert not has_killed((7, 3), root)
        assert has_killed((6, 3), root)
        assert has_killed((7, 2), root)

    def test_version_1_and_containers(self, root: Path) -> None:
        (root / "proc/self/cgroup").write_text("4:cpu,memory:/docker/abc\n0::/\n")
        group = root / "sys/fs/cgroup/memory/docker/abc"
        group.mkdir(parents=True)
        (group / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
        assert kills(root) == (7, 2, 0)

    def test_without_them_nobody_is_blamed(self, tmp_path: Path) -> None:
        assert kills(tmp_path) == (0,)
        assert not has_killed(kills(tmp_path), tmp_path)
        assert not has_killed((), tmp_path)

    def test_what_is_said(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mgpu.launch.oom_killer._ROOT", str(root))
        for counted in (False, True):
            child = Child.start((sys.executable, "-c", "input()"), dict(os.environ), tmp_path / "log", tied=False)
            if counted:
                (root / "proc/vmstat").write_text("oom_kill 8\n")
            os.kill(child.pid, signal.SIGKILL)
            wait_for(lambda child=child: child.poll() is not None, "it lives")  # type: ignore[misc]
            with Watch(child, LlamaCpp()) as watch:
                error = watch.death("while it was serving")
            child.stop()
            name = child.name
            assert isinstance(error, OutOfMemoryError) == counted
            assert error.message == (
                f"{name} was killed by the kernel while it was serving: out of RAM"
                if counted
                else f"{name} was killed by SIGKILL (out of memory?) while it was serving"
            )

    def test_it_was_not_sigkill(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mgpu.launch.oom_killer._ROOT", str(root))
        child = Child.start((sys.executable, "-c", "raise SystemExit(3)"), dict(os.environ), tmp_path / "log")
        (root / "proc/vmstat").write_text("oom_kill 8\n")
        wait_for(lambda: child.poll() is not None, "it lives")
        with Watch(child, LlamaCpp()) as watch:
            error = watch.death("before it was ready")
        child.stop()
        assert type(error) is RuntimeFailedError

    def test_from_the_command_line(self, house: CudaHouse, root: Path) -> None:
        """No smaller plan would help RAM: it ends, and says why."""
        house.close_gate("weights")
        running = house.run("--ctx", "8192", env=house.tuned({"mgpu.launch.oom_killer._ROOT": str(root)}))
        house.started(1)
        wait_for(lambda: house.launch()["runtime_pids"], "never started")
        (root / "proc/vmstat").write_text("oom_kill 8\n")
        house.kill_runtime()
        assert running.end() == 7
        assert "mgpu: llama-server was killed by the kernel before it was ready: out of RAM" in running.said
        assert "(out of memory?)" not in running.said

    def test_for_real(self, house: CudaHouse, group: Path) -> None:
        """A control group with too little RAM for what the runtime takes."""
        house.eats(1.0)
        joins = ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")
        running = house.run("--ctx", "8192", inside=joins)
        assert running.end() == 7, running.said
        assert "mgpu: llama-server was killed by the kernel before it was ready: out of RAM" in running.said
        house.assert_clean()

    @pytest.fixture
    def group(self) -> Iterator[Path]:
        """A control group with 400 MiB, or a skip."""
        for root, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
            group = Path("/sys/fs/cgroup") / root / f"mgpu-test-{os.getpid()}"
            try:
                group.mkdir()
                (group / limit).write_text(str(400 << 20))
            except OSError:
                with suppress(OSError):
                    group.rmdir()
                continue
            yield group
            wait_for(lambda group=group: not (group / "cgroup.procs").read_text(), "somebody lives there")  # type: ignore[misc]
            group.rmdir()
            return
        pytest.skip("no control group can be made here (root, and the memory controller)")
