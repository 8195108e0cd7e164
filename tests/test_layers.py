"""The house rule: imports go down only, and siblings of one rank do not know each other."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

RANKS = {
    **dict.fromkeys(["record", "config"], 0),
    **dict.fromkeys(["parallel", "data", "models", "diffusion", "scores"], 1),
    **dict.fromkeys(["weights", "training", "sampling"], 2),
    **dict.fromkeys(["pipeline", "planning"], 3),
    "experiment": 4,
}
COMMANDS = 5
NO_JAX = {"record", "config"}
LAUNCHING = ("sdx_launchers", "hydra_plugins")


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of every module imported anywhere in a file, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(root: Path) -> list[tuple[str, Path]]:
    """(house part, file) of every module; sdx/__init__.py only re-exports and has no rank."""
    found = []
    for path in sorted((root / "sdx").rglob("*.py")):
        part = path.relative_to(root / "sdx").parts[0].removesuffix(".py")
        if part not in ("__init__", "__main__"):
            found.append((part, path))
    return found


def test_imports_go_down_only(repository: Path) -> None:
    wrong = []
    for part, path in files(repository):
        rank = RANKS.get(part, COMMANDS)
        for name in imported(ast.parse(path.read_text())):
            pieces = name.split(".")
            if pieces[0] in LAUNCHING and rank != COMMANDS:
                wrong.append(f"{path.relative_to(repository)} (rank {rank}) imports {name}")
            if pieces[0] != "sdx" or len(pieces) < 2 or pieces[1] == part:
                continue
            if RANKS.get(pieces[1], COMMANDS) >= rank:
                wrong.append(f"{path.relative_to(repository)} (rank {rank}) imports {name}")
    assert not wrong, "\n".join(wrong)


def test_launchers_know_records_and_configuration_alone(repository: Path) -> None:
    """Only the adapters know Hydra's plugins, and nothing else knows the adapters."""
    wrong = []
    for path in sorted((repository / "launchers").rglob("*.py")):
        is_adapter = path.is_relative_to(repository / "launchers" / "hydra_plugins")
        for name in imported(ast.parse(path.read_text())):
            pieces = name.split(".")
            is_high = name != "sdx" and pieces[0] == "sdx" and RANKS.get(pieces[1], COMMANDS) > 0
            is_plugin = name.startswith(("hydra.plugins", "hydra_plugins"))
            if is_high or (is_plugin and not is_adapter):
                wrong.append(f"{path.relative_to(repository)} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["hydra_plugins.sdx.sweepers", "hydra_plugins.sdx.launchers"])
def test_hydra_looks_for_plugins_without_waiting_for_what_they_use(module: str) -> None:
    """Every composition executes the adapters, most of them for no sweep."""
    heavy = ["sdx_launchers", "submitit", "optuna", "google.cloud", "grpc", "matplotlib", "jax"]
    script = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_records_configuration_and_launchers_know_no_jax(repository: Path) -> None:
    rank_0 = [path for part, path in files(repository) if part in NO_JAX]
    wrong = [
        f"{path.relative_to(repository)} imports {name}"
        for path in [*rank_0, *(repository / "launchers").rglob("*.py")]
        for name in imported(ast.parse(path.read_text()))
        if name.split(".")[0] in ("jax", "flax", "optax", "orbax", "torch")
    ]
    assert not wrong, "\n".join(wrong)
