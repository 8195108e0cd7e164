"""The house rule: imports go down only, and siblings of one rank do not know each other."""

import ast
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
            if pieces[0] != "sdx" or len(pieces) < 2 or pieces[1] == part:
                continue
            if RANKS.get(pieces[1], COMMANDS) >= rank:
                wrong.append(f"{path.relative_to(repository)} (rank {rank}) imports {name}")
    assert not wrong, "\n".join(wrong)


def test_records_and_configuration_know_no_jax(repository: Path) -> None:
    wrong = [
        f"{path.relative_to(repository)} imports {name}"
        for part, path in files(repository)
        if part in NO_JAX
        for name in imported(ast.parse(path.read_text()))
        if name.split(".")[0] in ("jax", "flax", "optax", "orbax", "torch")
    ]
    assert not wrong, "\n".join(wrong)
