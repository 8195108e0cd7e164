"""What a plan looks like to people and to machines, and what the two answers make together."""

import json
from dataclasses import replace
from typing import Any

import pytest

from sdx.experiment.planning import make_plan
from sdx.planning.advice import Advice
from sdx.planning.collectives import Collective
from sdx.planning.compiled import CompiledProgram, CompiledReport, Overflow, ProgramBytes
from sdx.planning.estimate import estimate
from sdx.planning.report import WIDTH, render
from sdx.planning.report_json import to_json
from sdx.planning.verdict import Plan, combined
from tests.config.quick import quick

pytestmark = pytest.mark.fast

NUMBERS = {
    "num_devices", "num_hosts", "parameters", "global_batch_size", "flops_per_step",
    "images_per_s_roofline", "checkpoint_bytes", "host_memory_bytes", "flops_per_image",
}  # fmt: skip
TYPED = ("hardware=tpu_v5e_8", "train.global_batch_size=16")
HELD = {"parameters", "ema", "optimizer", "gradients", "frozen", "inputs", "activations", "total"}


def planned(*overrides: str) -> Plan:
    return make_plan(quick([*TYPED, *overrides]), compiles=False, level="O0")


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Of the tiny model on eight chips."""
    return planned()


def program(total: int, overflow: Overflow | None = None) -> CompiledProgram:
    held = ProgramBytes(2**22, 2**22, 2**22, total, total, 0)
    return CompiledProgram(
        bytes=None if overflow else held,
        overflow=overflow,
        flops=2e12,
        collectives={"all_gather": Collective(3, 2**20)},
        compile_s=1.5,
    )


def compiled(step: CompiledProgram, level: str = "O0") -> CompiledReport:
    return CompiledReport(
        programs={"encode": program(2**20), "step": step},
        level=level,
        versions={"jax": "1.2.3"},
        lower_s=2.0,
        host_peak_bytes=2**30,
        is_compiled=True,
        notes=["a note"],
    )


SMALL, LARGE = program(2**30), program(0, Overflow(needs=2**40, has=2**34))


def test_json_holds_what_it_promises(plan: Plan) -> None:
    found: dict[str, Any] = json.loads(to_json(plan))
    assert "\n" not in to_json(plan)
    for key in NUMBERS:
        assert isinstance(found[key], int | float) and found[key] > 0, key
    held = found["bytes_per_device"]
    assert held.keys() >= HELD and all(isinstance(count, int) for count in held.values())
    resident = ("parameters", "ema", "optimizer", "frozen", "inputs")
    assert held["total"] == sum(held[key] for key in resident) + max(
        held["step_temporaries"], held["encode_temporaries"]
    )
    whole = plan.estimate.placement.whole
    assert found["replicated_bytes"] == sum(whole.values()) > 0
    assert found["replicated_arrays"] == len(whole) > 0
    assert found["fits"] in {"yes", "no", "undecided"}
    unknown = ("collectives", "compiled", "compile_s", "host_peak_bytes", "fits_compiled")
    assert all(found[key] is None for key in unknown)
    assert [row["image"] for row in found["resolutions"]] == [[512, 512], [768, 768]]


def test_json_of_what_was_compiled(plan: Plan) -> None:
    found = json.loads(to_json(replace(plan, compiled=compiled(SMALL))))
    assert found["collectives"]["all_gather"] == {"count": 6, "bytes": 2 * 2**20}
    assert found["collectives"]["all_reduce"] == {"count": 0, "bytes": 0}
    assert (found["compile_s"], found["host_peak_bytes"]) == (3.0, 2**30)
    assert found["compiled"]["programs"]["step"]["donated"] is True
    assert found["fits_compiled"] is True and "a note" in found["notes"]
    large = json.loads(to_json(replace(plan, compiled=compiled(LARGE))))
    assert large["compiled"]["programs"]["step"]["needs_bytes"] == 2**40


@pytest.mark.parametrize(
    ("overrides", "step", "fits"),
    [
        ((), SMALL, "yes"),
        ((), LARGE, "undecided"),
        (("hardware.hbm_gib=0.01",), SMALL, "no"),
        (("hardware.hbm_gib=1.15",), SMALL, "yes"),
    ],
)
def test_the_compilers_answer_and_the_estimates(
    overrides: tuple[str, ...], step: CompiledProgram, fits: str
) -> None:
    assert combined(estimate(quick([*TYPED, *overrides])), compiled(step)) == fits


def test_the_estimate_alone_refuses_and_a_compiler_that_differs_leaves_it_open() -> None:
    found = estimate(quick([*TYPED, "hardware.hbm_gib=0.01"]))
    assert combined(found, None) == "no"
    tiny = compiled(program(2**10))
    tiny.programs["encode"] = program(2**10)
    assert combined(found, tiny) == "undecided"


def test_the_table_is_readable_and_ends_with_the_verdict(plan: Plan) -> None:
    lines = render(plan).splitlines()
    assert lines[0] == "tiny on tpu_v5e_8" and lines[-1].startswith("  fits          yes: ")
    assert max(map(len, lines)) <= WIDTH
    text = "\n".join(lines)
    for part in ("8, mesh data 1 x fsdp 8", "UNet, trained", "512 x 512", "768 x 768", "64 x 64*"):
        assert part in text
    rows = {"weights", "average", "optimizer", "frozen", "inputs", "step", "encode", "in all"}
    amounts = [line[16:28] for line in lines if line[:16].strip() in rows]
    assert len(amounts) == len(rows) and all(amount.endswith("iB") for amount in amounts)


def test_a_text_encoder_that_is_trained_is_not_called_frozen(plan: Plan) -> None:
    def frozen(found: Plan) -> str:
        [line] = [text for text in render(found).splitlines() if text.startswith("    frozen ")]
        return line[30:]

    assert frozen(plan) == "autoencoder and text encoder"
    assert frozen(planned("train.text_encoder=true")) == "autoencoder"


def test_what_every_device_holds_whole_is_told(plan: Plan) -> None:
    def told(whole: dict[str, int]) -> str:
        place = replace(plan.estimate.placement, whole=whole)
        changed = replace(plan, estimate=replace(plan.estimate, placement=place))
        [line] = [text for text in render(changed).splitlines() if text.startswith("  whole ")]
        return line.removeprefix("  whole").strip()

    assert told({"a/bias": 2**15, "b/bias": 2**14}) == "0.0 MiB in 2 arrays, each under 64 KiB"
    assert told({"a/kernel": 2**22, "b": 4}) == "4.0 MiB in 2 arrays, the largest 4.0 MiB: a/kernel"
    assert told({}) == "nothing"


def test_the_table_of_what_was_compiled(plan: Plan) -> None:
    text = render(replace(plan, compiled=compiled(SMALL)))
    assert "an upper bound" in text and "3 x all-gather" in text and "donated" in text
    at_default = render(replace(plan, compiled=compiled(SMALL, "default")))
    assert "an upper bound" not in at_default
    large = render(replace(plan, compiled=compiled(LARGE)))
    assert "does not fit: needs 1,024.00 GiB of 16.00 GiB" in large and "which differ" in large


def test_what_was_lowered_alone_is_not_called_compiled(plan: Plan) -> None:
    lowered = CompiledProgram(None, None, flops=None, collectives={}, compile_s=None)
    answer = replace(
        compiled(SMALL), programs={"encode": lowered, "step": lowered}, is_compiled=False
    )
    text = render(replace(plan, compiled=answer))
    assert "  lowered       in 2 s, not compiled; jax 1.2.3" in text and "a note" in text
    assert "upper bound" not in text and "compiled in" not in text


def test_advice_is_shown_before_the_verdict(plan: Plan) -> None:
    small = estimate(quick([*TYPED, "hardware.hbm_gib=0.01"]))
    refused = replace(plan, estimate=small, smallest_bytes=2**30)
    assert "1.00 GiB at the least" in render(refused).splitlines()[-2]
    advice = Advice(("optimizer=adafactor",), 2**20, changes_training=True, note=None)
    told = render(replace(refused, advice=(advice,))).splitlines()[-2]
    assert told == "  it fits with  optimizer=adafactor  (1.0 MiB, another training)"


def test_files_that_are_not_here_are_said_to_be_missing() -> None:
    found = planned("model.from_files=true", "model.pretrained=nobody/nothing")
    assert "nobody/nothing is not here" in render(found)
    assert json.loads(to_json(found))["notes"]
