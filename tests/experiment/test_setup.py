"""What is refused before a run folder is made, or said when the run begins."""

from pathlib import Path

import pytest

from sdx.config.compose import compose
from sdx.experiment.setup import bold_rate, lost_precision, run_paths
from sdx.record.lock import RefusedStart

pytestmark = pytest.mark.fast


def test_a_folder_that_checkpoints_cannot_be_read_from_is_refused() -> None:
    for name in ("[x]", "a\\b"):
        with pytest.raises(RefusedStart, match="checkpoints could not be read"):
            run_paths(compose([f"run.name='{name}'"]))
    odd = run_paths(compose(["run.name='$(touch x) ü'", "run.output_dir='~/runs'"]))
    assert odd.root == Path.home() / "runs" / "$(touch x) ü"


def test_weights_of_few_bits_are_told_what_they_lose() -> None:
    assert lost_precision(compose(["model.activations_dtype=bfloat16"])) is None
    said = lost_precision(compose(["model.weights_dtype=bfloat16"]))
    assert said is not None and "1/512" in said and "model.activations_dtype=bfloat16" in said


def test_lion_is_told_that_its_rates_are_its_own() -> None:
    assert bold_rate(compose(["optimizer=adafactor"])) is None
    said = bold_rate(compose(["optimizer=lion"]))
    assert said is not None and "optimizer.lr=2e-06" in said
