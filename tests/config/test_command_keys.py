"""Root keys of one command: typed like any, part of no configuration."""

import pytest

from sdx.config.arguments import parse_arguments
from sdx.config.command_keys import OptimizationLevel, PlanKeys, Report, keys_of, take
from sdx.config.leaves import leaves

pytestmark = pytest.mark.fast


def test_they_are_taken_out_of_the_overrides() -> None:
    typed = ["model=sd21", "compile=true", "report=json", "optimization_level=O1", "optimizer.lr=1"]
    rest, keys, problems = take("plan", typed)
    assert rest == ["model=sd21", "optimizer.lr=1"] and problems == []
    assert keys == PlanKeys(True, Report.json, OptimizationLevel.O1)
    assert take("plan", [])[1] == PlanKeys()
    assert take("train", ["model=sd21"]) == (["model=sd21"], None, [])


@pytest.mark.parametrize(
    ("command", "typed", "answer"),
    [
        ("plan", "complie=true", "complie=true: unknown key; did you mean compile?"),
        ("plan", "report=jsn", "report=jsn: must be one of text, json; did you mean json?"),
        ("plan", "compile=maybe", "compile=maybe: must be true or false."),
        ("plan", "report=text,json", "report=text,json: is one for all jobs and takes one value."),
        (
            "plan",
            "+compile=true",
            "+compile=true: the key is there, it is set; write compile=true.",
        ),
        (
            "train",
            "compile=true",
            "compile=true: a key of sdx.plan, sdx.train has none of that name; "
            "python -m sdx.plan … compile=true.",
        ),
    ],
)
def test_faults_are_answered(command: str, typed: str, answer: str) -> None:
    _, _, [problem] = take(command, [typed])
    assert str(problem) == answer


def test_a_flag_of_that_name_is_answered_with_the_key() -> None:
    [problem] = parse_arguments(["--report", "json"]).problems
    assert "options are written KEY=VALUE: report=json" in str(problem)


def test_no_key_of_a_run_has_their_name() -> None:
    assert not keys_of("plan").keys() & {path.split(".")[0] for path in leaves()}
