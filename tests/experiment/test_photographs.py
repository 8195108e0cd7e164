"""A folder of real photographs, captioned by file name: trains, samples, and names bad files."""

import json
import shutil
from pathlib import Path

import skimage
from PIL import Image

from tests.experiment.conftest import Command

RUN = [
    "data=imagefolder",
    "data.dir=photographs",
    "train.max_steps=4",
    "run.name=run",
    "export.at_end=false",
    "metrics.sinks=[jsonl]",
]


def fill(folder: Path) -> list[Path]:
    """Every picture scikit-image ships, in its own format and mode, its caption beside it."""
    folder.mkdir()
    shipped = Path(skimage.__file__).parent / "data"
    for path in sorted(shipped.iterdir()):
        if path.suffix in (".png", ".jpg", ".jpeg"):
            shutil.copy(path, folder)
            caption = path.stem.replace("_", " ")
            (folder / path.stem).with_suffix(".txt").write_text(f"a photograph of {caption}\n")
    return [path for path in folder.iterdir() if path.suffix != ".txt"]


def test_photographs_train_and_draw(command: Command) -> None:
    pictures = fill(command.folder / "photographs")
    assert len(pictures) >= 5
    Image.new("RGB", (40, 40)).save(command.folder / "photographs" / "cut.jpg")
    whole = (command.folder / "photographs" / "cut.jpg").read_bytes()
    (command.folder / "photographs" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (command.folder / "photographs" / "cut.txt").write_text("half a file\n")

    code, output = command.run_here(*RUN)
    assert code == 2 and "data.max_bad_fraction" in output, output
    assert not command.path("run").exists()

    code, output = command.run(*RUN, "data.max_bad_fraction=0.5")
    assert code == 0, output
    assert "skipped 1 bad images: truncated × 1" in output
    run = command.path("run")
    (bad,) = (run / "bad_images.jsonl").read_text().splitlines()
    assert json.loads(bad)["path"] == "cut.jpg"
    assert (run / "samples" / "0000004.png").is_file()

    drawing = ["--prompt", "a photograph of a cat", "--steps", "2", "--num-images", "2"]
    code, output = command.run(str(run), *drawing, "--sampler", "euler", command="sample")
    assert code == 0, output
    drawn = sorted(path.name for path in (run / "samples" / "drawn").iterdir())
    assert drawn == ["000-a-photograph-of-a-cat.png", "001-a-photograph-of-a-cat.png", "grid.png"]


def test_changed_photographs_are_not_mixed_into_a_run(command: Command) -> None:
    fill(command.folder / "photographs")
    assert command.run(*RUN, "sample.every=null")[0] == 0
    for path in (command.folder / "photographs").glob("c*"):
        path.unlink()
    code, output = command.run_here(*RUN, "train.max_steps=6")
    assert code == 2 and "content of data" in output, output


def test_missing_folder_is_refused(command: Command) -> None:
    code, output = command.run_here(*RUN)
    assert code == 2 and "Traceback" not in output
    assert "data.dir=photographs" in output
    assert not command.path().exists()
