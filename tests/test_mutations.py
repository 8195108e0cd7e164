"""The planted bugs fit the code as it is; whether tests notice them is shown by tests/mutations.py
before a release."""

import ast
from pathlib import Path

import pytest
import yaml

from tests.mutations import MUTATIONS, Mutation, mutated

pytestmark = pytest.mark.fast

PARSERS = {".py": lambda source: ast.dump(ast.parse(source)), ".yaml": yaml.safe_load}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.bug)
def test_every_bug_can_be_planted_and_has_its_tests(mutation: Mutation, repository: Path) -> None:
    source = (repository / mutation.file).read_text()
    planted = mutated(mutation, source)
    read = PARSERS[Path(mutation.file).suffix]
    assert read(planted) != read(source)
    for test in mutation.tests:
        path, _, name = test.partition("::")
        assert f"def {name or 'test_'}" in (repository / path).read_text(), test


def test_a_bug_without_a_place_is_an_error(repository: Path) -> None:
    with pytest.raises(ValueError, match="not exactly once"):
        mutated(MUTATIONS[0], "")
