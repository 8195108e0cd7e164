"""Where everything of one run lies, so that no other file spells a name inside a run folder."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def run(self) -> Path:
        return self.root / "run.json"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def lock(self) -> Path:
        return self.root / "lock.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    @property
    def loss_plot(self) -> Path:
        return self.root / "loss.png"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def bad_images(self) -> Path:
        return self.root / "bad_images.jsonl"

    def patch(self, attempt: int) -> Path:
        """Uncommitted changes of the source tree when that attempt started."""
        return self.attempts / f"{attempt}.patch"
