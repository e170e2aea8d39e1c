from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from mgpu.errors import ProfileError
from mgpu.rig import Rig
from mgpu.units import GIB
from mgpu_profiles.rigs import format_rig, parse_rig
from mgpu_profiles.store import BUNDLED, Store, user_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "config")


@pytest.fixture
def rig() -> Rig:
    return parse_rig((BUNDLED / "3090+3060.toml").read_text(encoding="utf-8"), "3090+3060")


def named(rig: Rig, name: str) -> Rig:
    return msgspec.structs.replace(rig, name=name)


def write(store: Store, name: str, content: str | bytes) -> Path:
    path = store.root / "rigs" / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def files(store: Store) -> list[str]:
    return [path.name for path in (store.root / "rigs").iterdir()]


def refused(act: Callable[[], object]) -> ProfileError:
    with pytest.raises(ProfileError) as caught:
        act()
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value


class TestLoad:
    def test_a_bundled_one(self, store: Store, rig: Rig) -> None:
        assert store.load("3090+3060") == rig

    def test_the_users_comes_first(self, store: Store, rig: Rig) -> None:
        write(store, "4090", format_rig(named(rig, "4090")))
        assert store.load("4090") == named(rig, "4090")

    @pytest.mark.parametrize("content", [b"", b"schema = 9", b"\xff\xfe"])
    def test_a_broken_one_of_the_users_does_not_fall_back(self, store: Store, content: bytes) -> None:
        path = write(store, "4090", content)
        assert str(path) in refused(lambda: store.load("4090")).message

    @pytest.mark.parametrize("spelling", ["{}", "./{}", "sub/../{}"])
    def test_a_file(
        self, store: Store, rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
    ) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "x.toml").write_text(format_rig(named(rig, "y")), encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        assert store.load(spelling.format("x.toml")) == named(rig, "y")

    def test_a_file_of_any_name_with_a_separator(self, store: Store, rig: Rig, tmp_path: Path) -> None:
        (tmp_path / "3090").write_text(format_rig(rig), encoding="utf-8")
        assert store.load(str(tmp_path / "3090")) == rig

    def test_a_file_saved_by_notepad(self, store: Store, rig: Rig) -> None:
        write(store, "home", b"\xef\xbb\xbf" + format_rig(rig).replace("\n", "\r\n").encode())
        assert store.load("home") == named(rig, "home")

    def test_a_copied_file_goes_by_its_new_name(self, store: Store, rig: Rig) -> None:
        write(store, "copy", format_rig(named(rig, "home")))
        assert store.load("copy").name == "copy"

    def test_unknown(self, store: Store) -> None:
        error = refused(lambda: store.load("2x309"))
        assert error.exit_code == 8
        assert error.message == "no rig profile is called '2x309'"
        assert "did you mean 2x3090" in error.hint

    @pytest.mark.parametrize("name", ["", ".", "..", "\x00", "zzz", "h" * 5000])
    def test_unknown_and_like_nothing(self, store: Store, name: str) -> None:
        assert "mgpu rig list" in refused(lambda: store.load(name)).hint

    @pytest.mark.parametrize("path", ["home.toml", "./home", "/nowhere/home.toml"])
    def test_no_such_file(self, store: Store, path: str) -> None:
        assert "no such profile file" in refused(lambda: store.load(path)).message

    def test_a_folder(self, store: Store, tmp_path: Path) -> None:
        assert "Is a directory" in refused(lambda: store.load(f"{tmp_path}/")).message

    def test_a_nul_in_a_path(self, store: Store) -> None:
        assert "null" in refused(lambda: store.load("a\x00.toml")).message

    def test_not_text(self, store: Store) -> None:
        write(store, "home", b'name = "\xe9"')
        assert "byte 8 (0xe9) is not UTF-8" in refused(lambda: store.load("home")).message

    @pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no endless file here")
    def test_an_endless_file(self, store: Store) -> None:
        assert "larger than 1 MiB" in refused(lambda: store.load("/dev/zero")).message


class TestNames:
    def test_bundled_alone(self, store: Store) -> None:
        assert [profile.name for profile in store.names()] == sorted(path.stem for path in BUNDLED.iterdir())
        assert {profile.origin for profile in store.names()} == {"bundled"}

    def test_the_users_come_first_and_shadow(self, store: Store, rig: Rig) -> None:
        for name in ("home", "4090"):
            store.save(rig, name)
        write(store, ".home", "half a file")
        (store.root / "rigs" / "notes.txt").touch()
        names = store.names()
        assert [(profile.name, profile.origin) for profile in names[:2]] == [("4090", "user"), ("home", "user")]
        assert [profile.name for profile in names].count("4090") == 1
        assert all(profile.path.exists() for profile in names)

    def test_every_one_can_be_loaded(self, store: Store) -> None:
        assert [store.load(profile.name).name for profile in store.names()] == [
            profile.name for profile in store.names()
        ]

    def test_a_file_in_the_folders_place(self, store: Store) -> None:
        store.root.mkdir()
        (store.root / "rigs").touch()
        assert "Not a directory" in refused(store.names).message


class TestSave:
    def test_what_is_saved_is_loaded(self, store: Store, rig: Rig) -> None:
        saved = store.save(rig, "home")
        assert store.load("home") == named(rig, "home")
        assert saved.path == store.root / "rigs" / "home.toml"
        assert saved.warnings == ()
        assert saved.path.stat().st_mode & 0o777 == 0o644
        assert files(store) == ["home.toml"]

    @pytest.mark.parametrize("name", ["", "..", "-x", "a/b", "a b", "x.toml", "ü"])
    def test_a_bad_name(self, store: Store, rig: Rig, name: str) -> None:
        assert repr(name) in refused(lambda: store.save(rig, name)).message
        assert not store.root.exists()

    def test_not_over_another(self, store: Store, rig: Rig) -> None:
        store.save(rig, "home")
        error = refused(lambda: store.save(store.load("h200"), "home"))
        assert "'home' already" in error.message
        assert "mgpu rig save home --force" in error.hint
        assert store.load("home") == named(rig, "home")

    def test_over_another_when_asked(self, store: Store, rig: Rig) -> None:
        store.save(rig, "home")
        store.save(store.load("h200"), "home", overwrite=True)
        assert store.load("home") == named(store.load("h200"), "home")

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("content", [b"", b"schema = 2\n", b"\xff", b"not toml"])
    def test_never_over_what_cannot_be_read(self, store: Store, rig: Rig, content: bytes, overwrite: bool) -> None:
        path = write(store, "home", content)
        error = refused(lambda: store.save(rig, "home", overwrite=overwrite))
        assert "not overwriting a profile that cannot be read" in error.message
        assert path.read_bytes() == content

    def test_a_bundled_name_is_warned_of(self, store: Store, rig: Rig) -> None:
        (warning,) = store.save(rig, "h200").warnings
        assert "'h200' is a bundled profile too" in warning
        assert store.load("h200") == named(rig, "h200")

    def test_not_what_could_not_be_read_again(self, store: Store, rig: Rig) -> None:
        nameless = msgspec.structs.replace(rig.gpus[0], name="")
        broken = msgspec.structs.replace(rig, gpus=(nameless,))
        assert "profile 'home', not saved: gpu[0].name" in refused(lambda: store.save(broken, "home")).message
        assert not store.root.exists()

    def test_a_symbolic_link_stays_one(self, store: Store, rig: Rig, tmp_path: Path) -> None:
        dotfile = tmp_path / "dotfiles" / "home.toml"
        path = write(store, "home", "")
        path.unlink()
        path.symlink_to(dotfile)
        store.save(rig, "home")
        assert path.is_symlink()
        assert parse_rig(dotfile.read_text(encoding="utf-8"), "") == named(rig, "home")

    def test_a_folder_in_its_place(self, store: Store, rig: Rig) -> None:
        (store.root / "rigs" / "home.toml").mkdir(parents=True)
        assert "Is a directory" in refused(lambda: store.save(rig, "home", overwrite=True)).message

    def test_the_folder_cannot_be_made(self, store: Store, rig: Rig) -> None:
        store.root.touch()
        error = refused(lambda: store.save(rig, "home"))
        assert str(store.root) in error.message
        assert "Not a directory" in error.message

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_no_right_to_write(self, store: Store, rig: Rig) -> None:
        store.save(rig, "home")
        (store.root / "rigs").chmod(0o555)
        error = refused(lambda: store.save(rig, "other"))
        assert "Permission denied" in error.message
        assert "XDG_CONFIG_HOME" in error.hint


def run_elsewhere(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since it is to die or to be limited."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


class TestAtomicity:
    """Whatever happens while a profile is written, one whole profile is there, the old or the new."""

    @pytest.mark.parametrize("moment", ["fsync", "replace", "fchmod"])
    def test_a_sudden_death(self, store: Store, rig: Rig, moment: str) -> None:
        store.save(rig, "home")
        died = run_elsewhere(
            """
            import os, sys
            from pathlib import Path
            from mgpu_profiles.store import Store

            store = Store(Path(sys.argv[1]))
            rig = store.load("h200")
            setattr(os, sys.argv[2], lambda *args, **kwargs: os._exit(9))
            store.save(rig, "home", overwrite=True)
            """,
            str(store.root),
            moment,
        )
        assert died.returncode == 9, died.stderr
        assert store.load("home") == named(rig, "home")
        assert [profile.name for profile in store.names() if profile.origin == "user"] == ["home"]

    def test_a_full_disk(self, store: Store, rig: Rig) -> None:
        """A limit on the size of files fails a write half-way, as a full disk does."""
        store.save(rig, "home")
        failed = run_elsewhere(
            """
            import resource, sys
            from pathlib import Path
            from mgpu.errors import ProfileError
            from mgpu_profiles.store import Store

            store = Store(Path(sys.argv[1]))
            rig = store.load("h200")
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            try:
                store.save(rig, "home", overwrite=True)
            except ProfileError as error:
                print(error.message)
            """,
            str(store.root),
        )
        assert failed.stderr == ""
        assert failed.stdout.startswith(f"cannot write {store.root / 'rigs' / 'home.toml'}: File too large")
        assert store.load("home") == named(rig, "home")
        assert files(store) == ["home.toml"]

    def test_ctrl_c(self, store: Store, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        store.save(rig, "home")

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.save(store.load("h200"), "home", overwrite=True)
        assert store.load("home") == named(rig, "home")
        assert files(store) == ["home.toml"]

    def test_many_at_once(self, store: Store) -> None:
        """Readers meanwhile see one of the profiles, whole."""
        rigs = {name: named(store.load(name), "home") for name in ("8x3090", "cpu-only", "h200", "2x3090")}
        store.save(rigs["h200"], "home")

        def save(name: str) -> None:
            for _ in range(10):
                store.save(rigs[name], "home", overwrite=True)

        def read(_: int) -> list[Rig]:
            return [store.load("home") for _ in range(50)]

        with ThreadPoolExecutor(8) as pool:
            saves = [pool.submit(save, name) for name in rigs]
            seen = [rig for rigs_read in pool.map(read, range(2)) for rig in rigs_read]
            for done in saves:
                done.result()
        assert all(rig in rigs.values() for rig in seen)
        assert store.load("home") in rigs.values()
        assert files(store) == ["home.toml"]


class TestRemove:
    def test_the_users(self, store: Store, rig: Rig) -> None:
        path = store.save(rig, "home").path
        assert store.remove("home") == ()
        assert not path.exists()
        assert "no rig profile is called 'home'" in refused(lambda: store.remove("home")).message

    def test_a_broken_one(self, store: Store) -> None:
        path = write(store, "home", "not toml")
        store.remove("home")
        assert not path.exists()

    def test_a_bundled_one_stays(self, store: Store) -> None:
        assert "cannot be removed" in refused(lambda: store.remove("h200")).message
        assert store.load("h200")

    def test_the_bundled_one_behind_it_comes_back(self, store: Store, rig: Rig) -> None:
        store.save(rig, "h200")
        store.use("h200")
        assert store.remove("h200") == ()
        assert store.load("h200").gpus[0].name == "NVIDIA H200"
        assert store.default() == "h200"

    def test_the_default(self, store: Store, rig: Rig) -> None:
        store.save(rig, "home")
        store.use("home")
        (warning,) = store.remove("home")
        assert "'home' was the default" in warning
        assert store.default() is None


class TestDefault:
    def test_none_at_first(self, store: Store) -> None:
        assert store.default() is None

    def test_use(self, store: Store, rig: Rig) -> None:
        store.save(rig, "home")
        store.use("home")
        assert store.default() == "home"
        store.use("2x3090")
        assert store.default() == "2x3090"
        store.use(None)
        assert store.default() is None
        store.use(None)

    @pytest.mark.parametrize(
        ("name", "said"),
        [("nothing", "no rig profile is called 'nothing'"), ("./x.toml", "not a file: './x.toml'")],
    )
    def test_what_cannot_be_one(self, store: Store, name: str, said: str) -> None:
        store.use("h200")
        assert said in refused(lambda: store.use(name)).message
        assert store.default() == "h200"

    def test_not_a_broken_one(self, store: Store) -> None:
        path = write(store, "home", "not toml")
        assert str(path) in refused(lambda: store.use("home")).message
        assert store.default() is None

    @pytest.mark.parametrize("pointer", ["vanished", "../../etc", "\x00"])
    def test_vanished(self, store: Store, pointer: str) -> None:
        store.root.mkdir()
        (store.root / "default-rig").write_text(pointer, encoding="utf-8")
        error = refused(store.default)
        assert repr(pointer) in error.message
        assert "mgpu rig use" in error.hint

    def test_unreadable(self, store: Store) -> None:
        (store.root / "default-rig").mkdir(parents=True)
        assert "Is a directory" in refused(store.default).message

    def test_unwritable(self, store: Store) -> None:
        (store.root / "default-rig").mkdir(parents=True)
        assert "cannot write" in refused(lambda: store.use("h200")).message
        assert "cannot remove" in refused(lambda: store.use(None)).message

    def test_a_link_to_itself(self, store: Store) -> None:
        pointer = store.root / "default-rig"
        store.root.mkdir()
        pointer.symlink_to(pointer)
        assert "symbolic links" in refused(store.default).message


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no XDG folders")
def test_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert user_store() == Store(tmp_path / "mgpu")


def test_a_plan_without_profiles_parses_none() -> None:
    """Asking for the default is on every run's way: it must not load what reads profiles."""
    code = """
        import sys
        from pathlib import Path
        from mgpu_profiles.store import Store

        assert Store(Path(sys.argv[1])).default() is None
        print(*sorted({"tomllib", "tomli_w", "difflib", "tempfile", "platformdirs"} & sys.modules.keys()))
    """
    done = run_elsewhere(code, "/nowhere")
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_the_total_of_a_bundled_rig_is_what_the_guide_says(store: Store) -> None:
    total = sum(gpu.total_bytes for gpu in store.load("3090+3060").gpus)
    assert total == 36 * GIB
