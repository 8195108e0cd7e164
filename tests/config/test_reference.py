"""Generated files are fresh, and the editors' schemas accept what composes and refuse typos."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from omegaconf import OmegaConf
from referencing import Registry, Resource

from sdx.config.folders import CONF
from sdx.config.launching import OPTIONS
from sdx.config.leaves import leaves, leaves_of
from sdx.config.reference import GLOBAL_GROUPS, config_page, config_schema, group_schema, rendered

pytestmark = pytest.mark.fast

FILES = sorted(CONF.glob("*/*.yaml"))
NAMES = [f"{file.parent.name}/{file.stem}" for file in FILES]


@cache
def validator(group: str) -> Draft202012Validator:
    schema = config_schema() if group == "config" else group_schema(group)
    registry = Registry().with_resource("config.json", Resource.from_contents(config_schema()))
    return Draft202012Validator(schema, registry=registry)


def loaded(file: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(file))


def test_the_generated_files_are_fresh(repository: Path) -> None:
    stale = [
        name
        for name, text in rendered().items()
        if not (repository / name).is_file() or (repository / name).read_text() != text
    ]
    assert stale == [], "run `python -m sdx.config.reference`"
    there = {f"docs/schema/{file.name}" for file in (repository / "docs/schema").iterdir()}
    assert there == set(rendered()) - {"docs/config.md"}


def test_the_page_has_every_key_once() -> None:
    page = config_page()
    assert [path for path in leaves() if page.count(f"\n| `{path}`") != 1] == []
    assert "| `optimizer.lr` † | a number, above 0 |  | warn | Peak learning rate. |" in page


def test_the_page_has_the_keys_of_every_sweeper_and_launcher() -> None:
    """In the section of the option, or where another before it has the same."""
    sections = dict(re.findall(r"^### (hydra\..*?)\n(.*?)(?=^#)", config_page(), re.M | re.S))
    assert len(sections) == sum(map(len, OPTIONS.values()))
    titles = iter(sections)
    for part, options in OPTIONS.items():
        told = ""
        for cls in options.values():
            told += sections[next(titles)]
            for name, leaf in leaves_of(cls).items():
                row = rf"\| `hydra\.{part}\.{name}` \| .*\| {re.escape(leaf.help)} \|"
                assert re.search(row, told), name


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_a_file_validates_and_a_typo_in_it_does_not(file: Path) -> None:
    content = loaded(file)
    check = validator(file.parent.name)
    assert [error.message for error in check.iter_errors(content)] == []
    for typo in typos(content):
        assert not check.is_valid(typo), typo


def typos(content: dict[str, Any]) -> list[dict[str, Any]]:
    """`content` with one key misspelt, for every key at every depth."""
    found = []
    for key, item in content.items():
        found.append({(f"{name}x" if name == key else name): of for name, of in content.items()})
        if isinstance(item, dict):
            found += [{**content, key: inner} for inner in typos(item)]
    return found


def test_the_base_file_validates() -> None:
    assert validator("config").is_valid(loaded(CONF / "config.yaml"))


@pytest.mark.parametrize(
    ("content", "valid"),
    [
        ({"optimizer": {"lr": "${train.max_steps}"}}, True),
        ({"train": {"epochs": None}}, True),
        ({"optimizer": {"lr": 0}}, False),
        ({"optimizer": {"lr": "fast"}}, False),
        ({"optimizer": {"lr": None}}, False),
        ({"metrics": {"sinks": ["jsonl"]}}, True),
        ({"metrics": {"sinks": ["paper"]}}, False),
        ({"data": {"interpolation": "cubic"}}, False),
        ({"hydra": {"verbose": True}}, True),
        ({"hydra": {"verbos": True}}, False),
        ({"hydra": {"launcher": {"nodes": 2, "zone": "us-central2-b"}}}, True),
        ({"hydra": {"launcher": {"nodes": 0}}}, False),
        ({"hydra": {"sweeper": {"max_paralel": 2}}}, False),
        ({"hydra": {"sweeper": {"params": {"optimizer.lr": "1e-5,5e-6", "model": "sd21"}}}}, True),
        ({"hydra": {"sweeper": {"params": {"optimiser.lr": "1e-5,5e-6"}}}}, False),
    ],
)
def test_values_are_checked(content: dict[str, Any], valid: bool) -> None:
    assert validator("experiment").is_valid(content) is valid


def test_global_groups_are_those_whose_files_say_so_and_files_name_their_schema() -> None:
    for file in FILES:
        lines = file.read_text().splitlines()
        is_global = lines[0] == "# @package _global_"
        assert is_global is (file.parent.name in GLOBAL_GROUPS), file
        name = f"docs/schema/{file.parent.name}.json"
        assert lines[int(is_global)] == f"# yaml-language-server: $schema=../../{name}"


def test_schemas_are_json_of_their_own_kind() -> None:
    for name, text in rendered().items():
        if name.endswith(".json"):
            Draft202012Validator.check_schema(json.loads(text))
