"""Whole Stable Diffusion models compiled for TPUs that are not here: minutes and gigabytes.

`pytest -s -m release tests/planning/test_whole_models.py` prints the rows that docs/planning.md
keeps.
"""

from functools import cache

import pytest

from sdx.planning.compiled import CompiledReport, compile_program
from sdx.planning.estimate import estimate
from sdx.planning.topology import has_compiler
from tests.config.quick import quick
from tests.conftest import require

pytestmark = pytest.mark.release

GIB = 2**30
UNET_BYTES = 2 * 865_910_724
"""Of all kernels of SD 2.1's UNet in bfloat16."""
SD21 = ("model=sd21", "hardware=tpu_v4_32", "data=pokemon")
TARGETS = {
    "sd21, 768 px, tpu_v4_32": SD21,
    "the same, train.remat=blocks": (*SD21, "train.remat=blocks"),
    "sd15, 512 px, tpu_v5e_8": (
        "model=sd15", "hardware=tpu_v5e_8", "data=pokemon",
        "train.per_device_batch_size=2", "train.remat=blocks",
    ),
}  # fmt: skip


@cache
def compiled(name: str) -> CompiledReport:
    """The report at O0, its row printed."""
    require(has_compiler(quick(TARGETS[name]).hardware.platform), "libtpu")
    report = compile_program(quick(TARGETS[name]), "O0")
    for program, found in report.programs.items():
        held, moved = found.bytes, found.collectives
        assert held is not None
        sizes = (held.arguments, held.temporaries, held.peak, held.code)
        kinds = ", ".join(f"{c.count} {kind} {c.bytes / GIB:.2f}" for kind, c in moved.items())
        cells = [f"{size / GIB:.2f}" for size in sizes]
        print(f"\n| {name} | {program} | {' | '.join(cells)} | {kinds} |", end="")
    print(f" {report.compile_s:.0f} s, {report.host_peak_bytes / GIB:.1f} GiB", report.versions)
    return report


@pytest.mark.parametrize("name", TARGETS)
def test_it_compiles_fits_and_donates(name: str) -> None:
    report, planned = compiled(name), estimate(quick(TARGETS[name]), "O0")
    encode, step = report.programs["encode"], report.programs["step"]
    assert planned.usable_bytes is not None and report.fits(planned.usable_bytes) is True
    assert step.donated and encode.bytes is not None and step.bytes is not None
    held = planned.device_bytes
    assert step.bytes.outputs == pytest.approx(held.state, rel=0.01)
    assert encode.bytes.arguments == pytest.approx(held.frozen, rel=0.05)  # and the images
    assert held.step.total == pytest.approx(step.bytes.temporaries, rel=0.25)
    assert report.host_peak_bytes < 12 * GIB


def test_parameters_are_gathered_whole_and_gradients_reduced_once() -> None:
    moved = compiled("sd21, 768 px, tpu_v4_32").programs["step"].collectives
    assert moved["all_gather"].bytes == pytest.approx(2 * UNET_BYTES, rel=0.1)  # forward, backward
    reduced = sum(moved[kind].bytes for kind in ("all_reduce", "reduce_scatter") if kind in moved)
    assert reduced == pytest.approx(UNET_BYTES, rel=0.1)
    assert "collective_permute" not in moved, "kernels passed on in a ring, slice by slice"


def test_recomputation_trades_operations_for_memory() -> None:
    plain = compiled("sd21, 768 px, tpu_v4_32").programs["step"]
    blocks = compiled("the same, train.remat=blocks").programs["step"]
    assert plain.bytes is not None and blocks.bytes is not None
    assert blocks.bytes.temporaries < 0.35 * plain.bytes.temporaries
    assert plain.flops is not None and blocks.flops is not None
    assert 1.2 < blocks.flops / plain.flops < 1.4
