"""The replayed losses; docs/images/loss_parity.png shows all 200 steps."""

from pathlib import Path

import numpy as np
import pytest

from tests.parity.loss_curve import NUM_STEPS, NUM_STRICT, TOLERANCE, draw, record, replay
from tests.weights.conftest import make_reference


def differences(num_steps: int, folder: Path) -> np.ndarray:
    model = make_reference("sd2", folder / "model")
    recording = record(model, num_steps)
    ours = replay(model, recording)
    assert recording.losses[-10:].mean() < 0.8 * recording.losses[:10].mean(), "nothing was learnt"
    draw(recording.losses, ours, folder / "curves.png")
    return np.abs(ours - recording.losses)


def test_losses_are_torchs_step_by_step(tmp_path: Path) -> None:
    assert differences(NUM_STRICT, tmp_path).max() <= TOLERANCE


@pytest.mark.release
def test_losses_stay_torchs(tmp_path: Path) -> None:
    assert differences(NUM_STEPS, tmp_path).max() <= 10 * TOLERANCE
