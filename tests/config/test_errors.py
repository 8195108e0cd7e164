"""What a person who mistypes reads: exact texts, all faults at once."""

import pytest

from sdx.config.compose import compose
from sdx.config.errors import ConfigError, Problem, any_of, nearest, render

pytestmark = pytest.mark.fast

MISTAKES = {
    "unknown key": (
        "optimizer.lrr=1e-4",
        "optimizer.lrr=1e-4: unknown key; did you mean optimizer.lr?",
    ),
    "key in the wrong group": (
        "train.lr=1e-4",
        "train.lr=1e-4: unknown key; did you mean optimizer.lr?",
    ),
    "misspelt group": (
        "optimiser.lr=1e-4",
        "optimiser.lr=1e-4: unknown key; did you mean optimizer.lr?",
    ),
    "key without its group": ("lr=1e-4", "lr=1e-4: unknown key; did you mean optimizer.lr?"),
    "misspelt group choice": ("modle=sd21", "modle=sd21: unknown key; did you mean model?"),
    "unknown option": (
        "model=sd12",
        "model=sd12: no such option; did you mean model=sd21?"
        " Options: sd15, sd20, sd20_base, sd21, sd21_base, tiny.",
    ),
    "option far from any": (
        "mesh=hypercube",
        "mesh=hypercube: no such option; use dp, fsdp, fsdp_tensor, hsdp or single.",
    ),
    "wrong type": ("optimizer.lr=abc", "optimizer.lr=abc: must be a number."),
    "text for a list": (
        "sample.prompts=yoda",
        "sample.prompts=yoda: must be a list of texts; write sample.prompts=[yoda].",
    ),
    "float for an integer": (
        "train.max_steps=1e5",
        "train.max_steps=1e5: must be a whole number, or null; use train.max_steps=100000.",
    ),
    "bad enum": (
        "diffusion.prediction_type=v_predicton",
        "diffusion.prediction_type=v_predicton: must be one of epsilon, v_prediction, sample,"
        " or null; did you mean v_prediction?",
    ),
    "bad enum in a list": (
        "metrics.sinks=[tensorbord]",
        "metrics.sinks=[tensorbord]: must be a list of tensorboard, jsonl, wandb;"
        " did you mean tensorboard?",
    ),
    "missing value": (
        "data.resolution=???",
        "data.resolution=???: a value is needed; it takes a whole number, or null.",
    ),
    "stray key": (
        "+stray.key=1",
        "+stray.key=1: unknown key; python -m sdx.train --help shows where to look.",
    ),
    "stray key in a group": (
        "+train.foo=1",
        "+train.foo=1: unknown key; python -m sdx.train --help shows where to look.",
    ),
    "adding what is there": (
        "+train.max_steps=3",
        "+train.max_steps=3: the key exists already; drop the +: train.max_steps=3.",
    ),
    "deleting": (
        "~train.max_steps",
        "~train.max_steps: keys are set, not moved or deleted; use train.max_steps=….",
    ),
    "group as a key": (
        "train=3",
        "train=3: this is a group of keys; set one, such as train.max_steps=….",
    ),
    "no value": ("max_steps", "max_steps: not KEY=VALUE; did you mean train.max_steps=…?"),
    "forgotten --multirun": (
        "optimizer.lr=1e-5,5e-6",
        "optimizer.lr=1e-5,5e-6: several values; add --multirun to run them all, or quote a value"
        " that holds a comma.",
    ),
    "peer's key": (
        "learning_rate=1e-5",
        "learning_rate=1e-5: a name of MaxDiffusion and diffusers; use optimizer.lr=1e-5.",
    ),
    "peer's key below a group": (
        "timestep_bias.strategy=later",
        "timestep_bias.strategy=later: a name of MaxDiffusion; use"
        " diffusion.timestep_bias.strategy=later (its keys one by one; the end of a range is"
        " inclusive).",
    ),
    "half precision": (
        "model.weights_dtype=float16",
        "model.weights_dtype=float16: float16 overflows without loss scaling; bfloat16 has"
        " float32's range in 2 bytes; use model.weights_dtype=bfloat16.",
    ),
    "half precision of activations": (
        "model.activations_dtype=fp16",
        "model.activations_dtype=fp16: float16 overflows without loss scaling; bfloat16 has"
        " float32's range in 2 bytes; use model.activations_dtype=bfloat16.",
    ),
    "not readable": (
        "run.name=a=b",
        "run.name=a=b: not readable (mismatched input '=' expecting <EOF>); quote values with"
        " special characters: 'run.name=\"…\"'.",
    ),
    "list of what is not readable": (
        "xla.flags=[--a=b]",
        "xla.flags=[--a=b]: not readable (no viable alternative at input '[--a='); quote values"
        " with special characters: 'xla.flags=[\"…\"]'.",
    ),
}


def problems_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("case", MISTAKES)
def test_one_mistake_is_answered_with_what_to_type(case: str) -> None:
    typed, text = MISTAKES[case]
    assert problems_of(typed) == [text]


def test_all_mistakes_are_listed_at_once() -> None:
    typed = [typed for typed, _ in MISTAKES.values()]
    assert set(problems_of(*typed)) == {text for _, text in MISTAKES.values()}


def test_a_sound_line_beside_a_mistake_is_still_checked() -> None:
    assert problems_of("optimizer.lrr=1", "optimizer.b1=2") == [
        "optimizer.lrr=1: unknown key; did you mean optimizer.lr?",
        "optimizer.b1=2: must be at least 0 and below 1.",
    ]


def test_a_fault_that_follows_from_a_mistake_is_not_shown() -> None:
    assert problems_of("data=imagefolder", "data.dri=photos") == [
        "data.dri=photos: unknown key; did you mean data.dir?"
    ]
    assert problems_of("model=sd12", "data.resolution=100") == [MISTAKES["unknown option"][1]]


def test_the_screen_has_one_line_a_fault_and_says_that_nothing_started() -> None:
    screen = render([Problem("a.b", "1", "must be 2", "use 2"), Problem("c", None, "missing")])
    assert screen.splitlines() == [
        "sdx: 2 faults in the configuration; nothing was started.",
        "  a.b=1: must be 2; use 2.",
        "  c: missing.",
    ]


def test_the_same_fault_of_several_jobs_is_said_once() -> None:
    problem = Problem("a", "1", "wrong")
    assert ConfigError([problem, problem]).problems == [problem]


def test_nearest_ignores_case_and_gives_up_on_strangers() -> None:
    assert nearest("SD21_Base", ["sd21", "sd21_base"]) == "sd21_base"
    assert nearest("zebra", ["lr", "eps"]) is None


def test_options_read_as_a_sentence() -> None:
    assert any_of([1]) == "1"
    assert any_of([1, 2, 4]) == "1, 2 or 4"
