"""Cases are made once for all tests here, and so are the runs that rows and reads look at."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sdx.models.networks import make_networks
from sdx.training import program as programs
from tests.effects.effect import Case
from tests.effects.files import make_files


@pytest.fixture(scope="package", autouse=True)
def networks_once() -> Iterator[None]:
    """Rows that differ in other things share the networks: most of a program's building."""
    made: dict[str, Any] = {}

    def shared(*args: Any, **options: Any) -> Any:
        key = repr((args, sorted(options.items(), key=lambda item: item[0])))
        if key not in made:
            made[key] = make_networks(*args, **options)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "make_networks", shared)
        yield


@pytest.fixture(scope="package")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[str]], Case]:
    """The case of some overrides, made once."""
    cases: dict[tuple[str, ...], Case] = {}
    root = tmp_path_factory.mktemp("effects")

    def make(overrides: Sequence[str]) -> Case:
        key = tuple(dict.fromkeys(overrides))
        if key not in cases:
            folder: Path = root / f"case{len(cases)}"
            folder.mkdir()
            cases[key] = Case(key, folder, make)
        return cases[key]

    make_files(root, make(()))
    return make
