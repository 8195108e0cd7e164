"""The files a run starts from: what it records of them, and when it does not start."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

from tests.experiment.conftest import Command
from tests.weights.hub_server import COMMIT, Hub, Repository, serve

TOKEN = "hf_" + "canary" * 6
MODEL = "somebody/tiny"
RUN = [
    f"model.pretrained={MODEL}",
    "run.name=it",
    "data.num_examples=32",
    "sample.every=null",
    "export.at_end=false",
    "metrics.sinks=[jsonl]",
]


def embedded(repository: Path) -> dict[str, bytes]:
    """The files of the model that ships with sdx."""
    tiny = repository / "sdx" / "assets" / "tiny"
    paths = [path for path in tiny.rglob("*") if path.is_file()]
    return {path.relative_to(tiny).as_posix(): path.read_bytes() for path in paths}


def test_a_run_stays_with_the_commit_it_began_with(command: Command, repository: Path) -> None:
    files = embedded(repository)
    served = Repository(files, token=TOKEN)
    with serve(Hub({MODEL: served})) as hub:
        known = hub.environment(command.folder / "hub") | {"HF_TOKEN": TOKEN}
        command = replace(command, environment=known)
        code, first = command.run(*RUN, "train.max_steps=1")
        assert code == 0, first
        begun = json.loads(command.path("it", "run.json").read_text())["weights"]

        served.commit, served.revisions = "f" * 40, ("main", COMMIT, "f" * 40)
        hub.requests.clear()
        code, second = command.run(*RUN, "train.max_steps=1")  # done, but looks at all it needs
        assert code == 0, second
        assert hub.requests
        assert not [path for _, path in hub.requests if "main" in path or "f" * 40 in path]
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (begun["source"], begun["commit"]) == (MODEL, COMMIT)
    assert begun["files"][vae] == hashlib.sha256(files[vae]).hexdigest()
    written = [path for path in command.path("it").rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert TOKEN not in first + second


def test_so_does_a_run_whose_files_name_its_folder(command: Command, repository: Path) -> None:
    unnamed = [word for word in RUN if not word.startswith("run.name")]
    unnamed += ["model.vae.scaling_factor=0.5", "model.from_files=true"]  # 1.0 in the files
    served = Repository(embedded(repository))
    with serve(Hub({MODEL: served})) as hub:
        command = replace(command, environment=hub.environment(command.folder / "hub"))
        code, first = command.run(*unnamed, "train.max_steps=1")
        assert code == 0, first
        served.commit, served.revisions = "f" * 40, ("main", COMMIT, "f" * 40)
        code, second = command.run(*unnamed, "train.max_steps=2")
        assert code == 0 and "continuing from step 1" in second, second
    (run,) = command.path().iterdir()
    assert json.loads((run / "run.json").read_text())["weights"]["commit"] == COMMIT


def test_damaged_files_refuse_the_start(command: Command, repository: Path) -> None:
    shutil.copytree(repository / "sdx" / "assets" / "tiny", command.folder / "model")
    weights = command.folder / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, output = command.run_here("model.pretrained=model", "train.max_steps=1")
    assert code == 2, output
    assert f"{weights.relative_to(command.folder)}: damaged or cut short" in output
    assert "Traceback" not in output
    assert not command.path().exists()
