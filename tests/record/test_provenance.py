"""Where a run came from, in a repository of the test's own."""

import os
import subprocess
from pathlib import Path

import pytest

from sdx.record import git as git_module
from sdx.record.provenance import git_commit, provenance, uncommitted_changes

pytestmark = pytest.mark.fast


def _git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The folder `sdx` of a committed source tree."""
    package = tmp_path / "sdx"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    (tmp_path / ".gitignore").write_text("outputs\n")
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", "-A")
    _git(tmp_path, "commit", "-q", "-m", "first")
    return package


def test_a_clean_tree_is_its_commit(package: Path) -> None:
    assert git_commit(package) == _git(package, "rev-parse", "HEAD")
    assert uncommitted_changes(package) is None


def test_the_patch_brings_back_every_change(package: Path, tmp_path: Path) -> None:
    commit = git_commit(package)
    assert commit is not None
    (package / "__init__.py").write_text("a = 2\n")
    (package / "added file.py").write_text("b = 1\n")
    (tmp_path / "notes.txt").write_text("outside the package: not ours to keep")
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "x").write_text("ignored")
    patch = uncommitted_changes(package)
    assert patch is not None
    assert "not ours" not in patch and "ignored" not in patch
    clone = tmp_path / "outputs" / "clone"
    _git(tmp_path, "clone", "-q", str(tmp_path), str(clone))
    _git(clone, "checkout", "-q", commit)
    subprocess.run(["git", "apply"], cwd=clone, input=patch, text=True, check=True)
    assert (clone / "sdx" / "__init__.py").read_text() == "a = 2\n"
    assert (clone / "sdx" / "added file.py").read_text() == "b = 1\n"


def test_large_and_binary_untracked_files_do_not_fill_the_folder(package: Path) -> None:
    (package / "large.bin").write_bytes(os.urandom(2 << 20))
    (package / "link").symlink_to("/etc/hostname")
    patch = uncommitted_changes(package)
    assert patch is not None and len(patch) < 1000
    assert "large.bin: untracked, not included" in patch


def test_an_environment_inside_somebodys_repository_is_not_ours(package: Path) -> None:
    installed = package.parent / "outputs" / "site-packages" / "sdx"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert git_commit(installed) is None
    assert uncommitted_changes(installed) is None


def test_without_git_or_a_repository_nothing_fails(
    package: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert git_commit(tmp_path_factory.mktemp("elsewhere")) is None
    monkeypatch.setenv("PATH", str(package))
    assert git_commit(package) is None
    assert uncommitted_changes(package) is None


def test_a_hanging_git_is_given_up(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = package / "git"
    fake.write_text("#!/bin/sh\nexec sleep 30\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{package}:{os.environ['PATH']}")
    monkeypatch.setattr(git_module, "_TIMEOUT_S", 0.1)
    assert git_commit(package) is None


def test_variables_of_a_git_hook_do_not_mislead(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    assert git_commit(package) is not None


def test_the_record_names_versions_and_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "canary-value")
    record = provenance()
    assert record["packages"]["jax"] and record["packages"]["numpy"]
    assert record["python"] and record["host"] and record["argv"]
    assert "canary-value" not in repr(record)
