"""Runs of the real command in processes of their own, on a UNet small enough to kill often."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import pytest

from sdx.train import main as train

REPOSITORY = Path(__file__).resolve().parents[2]
MICRO = [
    "model.unet.block_out_channels=[16]",
    "model.unet.down_block_types=[CrossAttnDownBlock2D]",
    "model.unet.attention_head_dim=[2]",
    "model.unet.layers_per_block=1",
    "model.unet.norm_num_groups=4",
    "train.per_device_batch_size=4",
    "lr_schedule=constant",
    "metrics.every=1",
    "sample.prompts=[a small red circle on a white background]",
    "sample.num_steps=2",
    "sample.num_adherence_prompts=null",
]


@dataclass(frozen=True)
class Command:
    """`python -m sdx.train` with the micro model, in a folder of its own."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    """Variables on top of this process's."""

    def start(
        self,
        *overrides: str,
        command: str = "train",
        slow_after: int | None = None,
        step_s: float = 1.0,
    ) -> subprocess.Popen[str]:
        """The running process; its output is one text. Steps of training `slow_after` that one take
        `step_s` each."""
        arguments = [*MICRO, *overrides] if command == "train" else list(overrides)
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        program = [f"sdx.{command}"]
        if slow_after is not None:
            program = ["tests.experiment.slowed", str(slow_after), str(step_s)]
            inherited["PYTHONPATH"] = str(REPOSITORY)
        return subprocess.Popen(
            [sys.executable, "-m", *program, *arguments],
            cwd=self.folder,
            env=inherited | self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *overrides: str, command: str = "train") -> tuple[int, str]:
        """Exit code and output."""
        process = self.start(*overrides, command=command)
        output, _ = process.communicate(timeout=600)
        return process.returncode, output

    def run_here(self, *overrides: str) -> tuple[int, str]:
        """As `run`, in this process, which has imported all it takes: for what trains nothing."""
        jax.devices()  # the eight of the tests, before a start asks for one
        said = io.StringIO()
        with chdir(self.folder), redirect_stdout(said), redirect_stderr(said):
            code = train([*MICRO, *overrides])
        return code, said.getvalue()

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath("outputs", *parts)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


@pytest.fixture
def rows() -> Callable[[Path], list[dict[str, Any]]]:
    """Rows of a run's metrics.jsonl without what depends on the clock."""

    def read(run: Path) -> list[dict[str, Any]]:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        kept = ("step", "loss", "grad_norm", "lr", "num_bad_steps")
        return [{key: json.loads(line)[key] for key in kept} for line in lines]

    return read
