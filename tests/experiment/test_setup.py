"""What is refused before a run folder is made."""

from pathlib import Path

import pytest

from sdx.config.compose import compose
from sdx.experiment.setup import run_paths
from sdx.record.lock import RefusedStart

pytestmark = pytest.mark.fast


def test_a_folder_that_checkpoints_cannot_be_read_from_is_refused() -> None:
    for name in ("[x]", "a\\b"):
        with pytest.raises(RefusedStart, match="checkpoints could not be read"):
            run_paths(compose([f"run.name='{name}'"]))
    odd = run_paths(compose(["run.name='$(touch x) ü'", "run.output_dir='~/runs'"]))
    assert odd.root == Path.home() / "runs" / "$(touch x) ü"
