"""What an installed sdx needs, written down so that pip can install it elsewhere."""

import json
import re
from importlib import metadata

_EXTRA = re.compile(r"""\s*(?:;|and)\s*extra == ["']([^"']+)["']""")


def pyproject() -> str | None:
    """A pyproject.toml with the dependencies and extras of the installed sdx; None where sdx is not
    installed."""
    try:
        about = metadata.metadata("sdx")
    except metadata.PackageNotFoundError:
        return None
    needed: dict[str | None, list[str]] = {None: []}
    for requirement in about.get_all("Requires-Dist") or ():
        extra = _EXTRA.search(requirement)
        name = None if extra is None else extra[1]
        needed.setdefault(name, []).append(_EXTRA.sub("", requirement).strip())
    extras = [f"{name} = {json.dumps(what)}" for name, what in needed.items() if name is not None]
    lines = [
        "[build-system]",
        'requires = ["hatchling>=1.27"]',
        'build-backend = "hatchling.build"',
        "[project]",
        'name = "sdx"',
        f"version = {json.dumps(about['Version'])}",
        f"requires-python = {json.dumps(about['Requires-Python'])}",
        f"dependencies = {json.dumps(needed[None])}",
        "[project.optional-dependencies]",
        *extras,
        "[tool.hatch.build.targets.wheel]",
        'only-include = ["sdx", "sdx_launchers", "hydra_plugins"]',
    ]
    return "\n".join(lines) + "\n"
