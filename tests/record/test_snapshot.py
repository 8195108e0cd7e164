"""Code copied aside: what is in it, that it never changes, and that nothing broken is ever used."""

import errno
import io
import json
import os
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from sdx.record import snapshot as snapshot_module
from sdx.record.git import git_names
from sdx.record.provenance import git_commit, uncommitted_changes
from sdx.record.snapshot import Snapshot, SnapshotError, pack, take_snapshot

pytestmark = pytest.mark.fast


def _git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def _write(top: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)


CHECKOUT = {
    "sdx/__init__.py": "a = 1\n",
    "conf/config.yaml": "a: 1\n",
    "launchers/sdx_launchers/__init__.py": "",
    "pyproject.toml": "[project]\n",
    "docs/page.md": "text\n",
    ".gitignore": "outputs/\n__pycache__/\n",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The package sdx of a committed checkout."""
    top = tmp_path / "tree"
    _write(top, CHECKOUT)
    _git(top, "init", "-q")
    _git(top, "add", "-A")
    _git(top, "commit", "-q", "-m", "first")
    return top / "sdx"


@pytest.fixture
def take(package: Path, tmp_path: Path) -> Callable[[], Snapshot]:
    return lambda: take_snapshot(tmp_path / "snapshots", package)


def names(snapshot: Snapshot) -> set[str]:
    below = [path for path in snapshot.path.rglob("*") if path.is_symlink() or path.is_file()]
    return {path.relative_to(snapshot.path).as_posix() for path in below} - {"snapshot.json"}


def test_a_snapshot_is_the_work_tree_and_not_the_commit(
    package: Path, take: Callable[[], Snapshot]
) -> None:
    top = package.parent
    _write(top, {"sdx/__init__.py": "a = 2\n", "sdx/new file.py": "", "conf/mine.yaml": ""})
    _write(top, {"notes.txt": "", "outputs/x": "", "sdx/__pycache__/x.pyc": "", ".venv/x": ""})
    (top / "docs" / "page.md").unlink()
    snapshot = take()
    expected = {*CHECKOUT, "sdx/new file.py", "conf/mine.yaml"} - {"docs/page.md"}
    assert names(snapshot) == expected
    assert (snapshot.path / "sdx" / "__init__.py").read_text() == "a = 2\n"
    assert snapshot.python_path == (snapshot.path, snapshot.path / "launchers")
    assert snapshot.commit == _git(top, "rev-parse", "HEAD")


def test_code_in_a_snapshot_says_where_it_was_taken_from(
    package: Path, take: Callable[[], Snapshot]
) -> None:
    (package / "__init__.py").write_text("a = 2\n")
    patch, commit = uncommitted_changes(package), git_commit(package)
    assert patch is not None and commit is not None
    snapshot = take()
    _git(package, "commit", "-q", "-a", "-m", "second")
    assert git_commit(snapshot.path / "sdx") == commit
    assert uncommitted_changes(snapshot.path / "sdx") == patch
    again = take_snapshot(package.parents[1] / "nested", snapshot.path / "sdx")
    assert (again.digest, again.commit) == (snapshot.digest, commit)
    assert names(again) == names(snapshot)


def test_the_same_code_is_taken_once_and_other_code_apart(
    package: Path, take: Callable[[], Snapshot]
) -> None:
    first = take()
    inode = first.path.stat().st_ino
    assert take() == first and first.path.stat().st_ino == inode
    (package / "__init__.py").write_text("a = 2\n")
    changed = take()
    assert changed.digest != first.digest
    assert (first.path / "sdx" / "__init__.py").read_text() == "a = 1\n"
    _git(package, "commit", "-q", "-a", "-m", "second")
    committed = take()  # the same files, of which a run shall tell the right commit
    assert committed.digest != changed.digest and committed.commit == git_commit(package)
    assert sorted(path.name for path in first.path.parent.iterdir()) == sorted(
        [first.digest, changed.digest, committed.digest]
    )


def test_files_of_a_snapshot_cannot_be_written(take: Callable[[], Snapshot]) -> None:
    path = take().path
    files = [file for file in path.rglob("*") if file.is_file()]
    assert not [file for file in files if file.stat().st_mode & 0o222]
    assert path.stat().st_mode & 0o777 == 0o700


def _lose_a_file(path: Path) -> None:
    (path / "sdx" / "__init__.py").unlink()


def _change_a_file(path: Path) -> None:
    file = path / "sdx" / "__init__.py"
    file.chmod(0o600)
    file.write_text("a = 3\n")


def _lose_the_record(path: Path) -> None:
    (path / "snapshot.json").unlink()


def _halve_the_record(path: Path) -> None:
    record = path / "snapshot.json"
    text = record.read_text()
    record.chmod(0o600)
    record.write_text(text[: len(text) // 2])


def _forget_files(path: Path) -> None:
    record = path / "snapshot.json"
    fields = json.loads(record.read_text())
    record.chmod(0o600)
    record.write_text(json.dumps({**fields, "files": {}}))


@pytest.mark.parametrize(
    "damage", [_lose_a_file, _change_a_file, _lose_the_record, _halve_the_record, _forget_files]
)
def test_a_damaged_snapshot_is_taken_again(
    take: Callable[[], Snapshot], damage: Callable[[Path], None]
) -> None:
    first = take()
    damage(first.path)
    assert take() == first
    assert (first.path / "sdx" / "__init__.py").read_text() == "a = 1\n"
    assert names(first) == set(CHECKOUT)


def test_what_a_killed_process_left_is_not_used_and_goes(take: Callable[[], Snapshot]) -> None:
    snapshot = take()
    old, young = (snapshot.path.parent / f".{name}.tmp" for name in ("old", "young"))
    for draft in (old, young):
        (draft / "sdx").mkdir(parents=True)
    long_ago = time.time() - 2 * snapshot_module._DRAFT_LIVES_S
    os.utime(old, (long_ago, long_ago))
    take()
    assert young.exists() and not old.exists()


def test_processes_that_take_it_at_once_share_it(package: Path, tmp_path: Path) -> None:
    _write(package, {f"module_{number}.py": "x = 1\n" * 1000 for number in range(50)})
    script = (
        "import sys; from pathlib import Path; from sdx.record.snapshot import take_snapshot;"
        "print(take_snapshot(Path(sys.argv[1]), Path(sys.argv[2])).path)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "snapshots"), str(package)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    (path,) = {out for out, _ in said}
    assert os.listdir(tmp_path / "snapshots") == [Path(path.strip()).name]
    assert snapshot_module._is_whole(Path(path.strip()))


def test_links_lead_to_what_they_led_to(
    package: Path, take: Callable[[], Snapshot], tmp_path: Path
) -> None:
    outside = tmp_path / "outside.py"
    outside.write_text("b = 1\n")
    (package / "outside.py").symlink_to(outside)
    (package / "inside.py").symlink_to("__init__.py")
    (package / "conf").symlink_to("../conf")
    (package / "nowhere.py").symlink_to("missing.py")
    snapshot = take()
    outside.write_text("b = 2\n")
    copy = snapshot.path / "sdx"
    assert (copy / "outside.py").read_text() == "b = 1\n"
    assert (copy / "inside.py").read_text() == "a = 1\n"
    assert (copy / "conf").is_symlink() and (copy / "conf" / "config.yaml").is_file()
    assert not os.path.lexists(copy / "nowhere.py")


def test_all_that_cannot_be_copied_is_named_at_once(
    package: Path, take: Callable[[], Snapshot], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_module, "_MAX_UNTRACKED_BYTES", 1 << 20)
    with open(package / "weights.bin", "wb") as file:
        file.truncate(3 << 20)
    (package / "elsewhere").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (package / "pipe.py").symlink_to(tmp_path / "pipe")
    (package / "loop.py").symlink_to("loop.py")
    with pytest.raises(SnapshotError) as caught:
        take()
    lines = str(caught.value).splitlines()
    assert "4 files cannot be" in lines[0] and ".gitignore" in lines[-1]
    assert lines[1:-1] == [
        "  sdx/elsewhere: a link to a folder outside of the source tree",
        "  sdx/loop.py: Too many levels of symbolic links",
        "  sdx/pipe.py: not a file",
        "  sdx/weights.bin: untracked and 3 MiB large; up to 1 MiB are copied",
    ]
    assert not list((tmp_path / "snapshots").iterdir())
    (package.parent / ".gitignore").write_text("weights.bin\nelsewhere\npipe.py\nloop.py\n")
    assert "sdx/weights.bin" not in names(take())


def test_an_unreadable_file_is_named(
    package: Path, take: Callable[[], Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        if path.name == "__init__.py":
            raise PermissionError(13, "Permission denied")
        return "file"

    monkeypatch.setattr(snapshot_module, "_content", refuse)  # root can read everything
    with pytest.raises(SnapshotError, match="sdx/__init__.py: Permission denied"):
        take()


@pytest.mark.parametrize("at", ["make the folder", "copy"])
def test_a_folder_that_takes_no_snapshot_is_named(
    take: Callable[[], Snapshot], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if at == "copy":
        monkeypatch.setattr(snapshot_module.shutil, "copyfileobj", full)
    else:
        (tmp_path / "snapshots").write_text("")
    with pytest.raises(SnapshotError) as caught:
        take()
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{tmp_path / 'snapshots'}: takes no snapshot")


def test_a_repository_inside_and_a_name_of_any_bytes(
    package: Path, take: Callable[[], Snapshot]
) -> None:
    inner = package / "inner"
    _write(inner, {"code.py": "c = 1\n"})
    _git(inner, "init", "-q")
    odd = os.fsdecode(b"odd \xff.py")
    (package / odd).write_text("")
    assert git_names(package, "--others", "--", odd) == [odd]
    snapshot = take()
    assert (snapshot.path / "sdx" / odd).is_file()
    assert (snapshot.path / "sdx" / "inner" / "code.py").is_file()
    assert not (snapshot.path / "sdx" / "inner" / ".git").exists()
    assert take() == snapshot


def test_without_git_the_packages_are_copied(
    take: Callable[[], Snapshot], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    snapshot = take()
    assert snapshot.commit is None
    assert names(snapshot) == set(CHECKOUT) - {"docs/page.md", ".gitignore"}


def test_an_installed_sdx_can_be_installed_from_its_snapshot(tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    ours = ["sdx/__init__.py", "sdx/conf/config.yaml", "sdx_launchers/__init__.py"]
    ours.append("hydra_plugins/sdx/launchers.py")
    _write(site, dict.fromkeys([*ours, "hydra_plugins/others/x.py", "other/__init__.py"], ""))
    snapshot = take_snapshot(tmp_path / "snapshots", site / "sdx")
    assert names(snapshot) == {*ours, "pyproject.toml"}
    assert snapshot.python_path == (snapshot.path,)
    project = tomllib.loads((snapshot.path / "pyproject.toml").read_text())["project"]
    assert any(requirement.startswith("hydra-core") for requirement in project["dependencies"])
    assert project["optional-dependencies"]["tpu"] == ["jax[tpu]"]
    assert not any("extra" in requirement for requirement in project["dependencies"])


def test_a_packed_snapshot_is_the_same_elsewhere(
    take: Callable[[], Snapshot], tmp_path: Path
) -> None:
    snapshot = take()
    packed = pack(snapshot)
    (snapshot.path / "sdx" / "__pycache__").mkdir()
    (snapshot.path / "sdx" / "__pycache__" / "x.pyc").write_text("")
    assert pack(snapshot) == packed
    there = tmp_path / snapshot.digest
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(there, filter="data")
        assert {member.uname for member in archive.getmembers()} == {""}
    assert snapshot_module._is_whole(there)


def test_secrets_in_a_change_stay_out(package: Path, take: Callable[[], Snapshot]) -> None:
    (package / "__init__.py").write_text("token = 'hf_" + "a" * 30 + "'\n")
    assert "hf_a" not in (take().path / "snapshot.json").read_text()


def test_this_very_tree_runs_from_its_snapshot(tmp_path: Path) -> None:
    snapshot = take_snapshot(tmp_path / "snapshots")
    script = "import sdx, sdx_launchers; from sdx.config.folders import CONF; print(CONF)"
    path = os.pathsep.join(map(str, snapshot.python_path))
    said = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert said.stdout.strip() == str(snapshot.path / "conf"), said.stderr
