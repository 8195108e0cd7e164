"""What an evaluation is asked for, and what of it does not go together."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from sdx.record.paths import RunPaths
from sdx.record.validation import Step, parse_run

# Options by what they belong to.
HOW = ("steps", "guidance", "negative_prompt", "dtype", "sampler", "seed")
DRAWN = ("prompts", "out")
LOSS = ("split", "num_batches")
OF_RUN = ("step", "weights")


class EvaluationError(ValueError):
    """Arguments that ask for nothing, or for what cannot be."""


class Kind(Enum):
    """What is evaluated."""

    run = "run"
    pictures = "pictures"
    model = "model"


@dataclass(frozen=True)
class Request:
    """The arguments of the command; None is what was not given."""

    source: str
    split: str | None = None
    num_batches: int | None = None
    step: Step | None = None
    weights: Literal["ema", "raw"] | None = None
    fid: Path | None = None
    inception: Path | None = None
    save_statistics: Path | None = None
    clip: Path | None = None
    adherence: int | None = None
    prompts: Path | None = None
    out: Path | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    dtype: str | None = None
    sampler: str | None = None
    seed: int | None = None
    batch_size: int | None = None
    model: str | None = None

    @property
    def scores_pictures(self) -> bool:
        """Whether networks look at pictures."""
        return any(v is not None for v in (self.fid, self.save_statistics, self.clip))

    @property
    def draws(self) -> bool:
        """Whether anything but the validation loss is asked for."""
        return self.scores_pictures or self.adherence is not None


def kind_of(paths: RunPaths[Any]) -> Kind:
    """What lies there, if anything does: what is not there may be a model of the Hub."""
    if paths.config.is_file():
        return Kind.run
    is_folder = isinstance(paths.root, Path) and paths.root.is_dir()
    is_model = (paths.root / "model_index.json").is_file()
    return Kind.pictures if is_folder and not is_model else Kind.model


def check_request(request: Request, kind: Kind) -> None:
    """Raises one EvaluationError with everything that does not go together."""
    has_inception = request.inception is not None
    uses_inception = request.fid is not None or request.save_statistics is not None
    says_step = parse_run(request.source)[1] is not None
    # (options, what must hold of them, what is said otherwise); of an option the first that fails
    rules: list[tuple[tuple[str, ...], bool, str]] = [
        ((*DRAWN, *HOW, "adherence"), kind is not Kind.pictures, "needs a run or a model"),
        (("model",), kind is Kind.model, "says what an original .safetensors file is"),
        ((*LOSS, *OF_RUN), kind is Kind.run, "needs a run of sdx"),
        (("step",), not says_step, f"{request.source} says it; leave it out"),
        (HOW, request.draws, "is about pictures; needs --fid, --clip or --adherence"),
        (DRAWN, request.scores_pictures, "is about pictures; needs --fid or --clip"),
        (LOSS, not request.draws, "is about the validation loss, not about --fid, --clip or such"),
        (("fid", "save_statistics"), has_inception, "needs --inception FILE, its network"),
        (("inception",), uses_inception, "needs --fid REFERENCE or --save-statistics FILE"),
    ]
    faults: dict[str, str] = {}
    for names, holds, rule in rules:
        for name in names:
            if not holds and getattr(request, name) is not None:
                faults.setdefault(name, f"--{name.replace('_', '-')}: {rule}.")
    if not request.draws and kind is not Kind.run:
        faults["source"] = (
            f"{request.source}: no run of sdx, so it has no validation loss; ask for --fid "
            "REFERENCE --inception FILE, or for --clip FOLDER."
        )
    if request.scores_pictures and kind is not Kind.pictures and request.prompts is None:
        faults["prompts"] = "--prompts: missing; give the file of what is drawn to be scored."
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        lines = [f"{count} in the arguments; nothing was done.", *faults.values()]
        raise EvaluationError("\n  ".join(lines))
