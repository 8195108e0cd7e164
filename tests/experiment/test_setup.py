"""What is refused before a run folder is made, or said when the run begins."""

import json
from pathlib import Path

import pytest

from sdx.config.compose import compose
from sdx.experiment.setup import bold_rate, data_at_recorded_commit, lost_precision, run_paths
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


def test_a_run_goes_on_with_the_dataset_that_it_began_with(tmp_path: Path) -> None:
    place = [f"run.output_dir={tmp_path}", "run.name=run"]
    pictures = ["data=huggingface", "data.name=somebody/pictures"]
    config = compose([*place, *pictures])
    assert data_at_recorded_commit(config) == config.data
    record = {"data": {"source": "somebody/pictures", "commit": "f" * 40}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    assert data_at_recorded_commit(config).revision == "f" * 40
    other = compose([*place, "data=huggingface", "data.name=somebody/else"])
    assert data_at_recorded_commit(other) == other.data
    typed = compose([*place, *pictures, "data.revision=v2"])
    assert data_at_recorded_commit(typed) == typed.data
