"""Where everything of one run lies, so that no other file spells a name inside a run folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from sdx.record.store import ObjectPath

Root = TypeVar("Root", Path, ObjectPath, Path | ObjectPath)


@dataclass(frozen=True)
class RunPaths(Generic[Root]):
    root: Root

    @property
    def config(self) -> Root:
        return self.root / "config.yaml"

    @property
    def run(self) -> Root:
        return self.root / "run.json"

    @property
    def status(self) -> Root:
        return self.root / "status.json"

    @property
    def lock(self) -> Root:
        return self.root / "lock.json"

    @property
    def stop(self) -> Root:
        """What somebody asked the run to do: see stop_request."""
        return self.root / "stop.json"

    @property
    def metrics(self) -> Root:
        return self.root / "metrics.jsonl"

    @property
    def evaluation(self) -> Root:
        """What `sdx.evaluate` found, a line each time."""
        return self.root / "evaluation.jsonl"

    @property
    def tensorboard(self) -> Root:
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Root:
        return self.root / "checkpoints"

    @property
    def samples(self) -> Root:
        return self.root / "samples"

    @property
    def attempts(self) -> Root:
        return self.root / "attempts"

    @property
    def loss_plot(self) -> Root:
        return self.root / "loss.png"

    @property
    def export(self) -> Root:
        return self.root / "export"

    @property
    def log(self) -> Root:
        return self.root / "log.txt"

    @property
    def bad_images(self) -> Root:
        return self.root / "bad_images.jsonl"

    def patch(self, attempt: int) -> Root:
        """Uncommitted changes of the source tree when that attempt started."""
        return self.attempts / f"{attempt}.patch"

    def profile(self, attempt: int) -> Root:
        """Traces of that attempt, as TensorBoard's profile plugin looks for them."""
        return self.root / "profile" / str(attempt)
