"""The wheel is whole: built, put into an empty environment, it trains from another folder."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment that holds sdx's wheel and, by path, what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    repository = Path(__file__).resolve().parents[1]
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
    ]
    subprocess.run([*build, str(repository)], check=True)
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    (wheel,) = folder.glob("sdx-*.whl")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
    ]
    subprocess.run([*install, str(wheel)], check=True)
    # A path line does not execute the .pth files in that folder: an editable sdx stays invisible.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), "-m", "sdx.train", *arguments]
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)


def test_wheel_carries_configuration_and_model(wheel_python: Path, tmp_path: Path) -> None:
    where = subprocess.run(
        [wheel_python, "-c", "import sdx; print(sdx.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    ).stdout
    assert str(wheel_python.parents[1]) in where, where
    shown = run(wheel_python, tmp_path, "--cfg", "job")
    assert shown.returncode == 0, shown.stderr
    assert "name: tiny" in shown.stdout
    installed = Path(where.strip()).parents[1]
    script = installed / "sdx_launchers" / "tpu" / "bootstrap.sh"
    assert script.is_file()  # what TPU workers run first
    clip = installed / "sdx" / "assets" / "clip"
    for kind in ("sd1", "sd2"):
        assert (clip / kind / "vocab.json").is_file() and (clip / kind / "merges.txt").is_file()


def test_wheel_trains_from_another_folder(wheel_python: Path, tmp_path: Path) -> None:
    short = ["debug=fast", "train.max_steps=2", "sample.num_adherence_prompts=null"]
    trained = run(wheel_python, tmp_path, *short)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    (metrics,) = tmp_path.glob("outputs/*/metrics.jsonl")
    assert len(metrics.read_text().splitlines()) >= 1


SWEEP = ["--multirun", "run.seed=0,1", "hydra.sweeper.dry_run=true", "debug=fast"]


def test_the_wheel_finds_its_sweepers_and_launchers(wheel_python: Path, tmp_path: Path) -> None:
    shown = run(wheel_python, tmp_path, *SWEEP)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "2 jobs on local" in shown.stdout and list(tmp_path.iterdir()) == []


def test_a_checkout_that_is_not_installed_finds_them(
    wheel_python: Path, tmp_path: Path, repository: Path
) -> None:
    """Typed in the checkout: its own launchers come before those of an sdx that is installed."""
    shown = run(wheel_python, repository, *SWEEP, f"run.output_dir={tmp_path / 'runs'}")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "2 jobs on local" in shown.stdout and list(tmp_path.iterdir()) == []
    where = "import sdx.config.compose as c; c.register(); import sdx_launchers as s; print(s)"
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = subprocess.run(
        [wheel_python, "-c", where], cwd=repository, env=clean, capture_output=True, text=True
    )
    assert str(repository / "launchers") in found.stdout, found.stdout + found.stderr


PLUGIN = """
import numpy as np
from sdx.data.source import Example

class Stripes:
    fingerprint = "stripes 1"

    def __init__(self, options, split, resolution):
        assert split == "train", split
        self.side, self.length = resolution, options["length"]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image = np.zeros((self.side, self.side, 3), np.uint8)
        image[index % 4 :: 4] = 255
        return Example(image, (f"stripes from line {index % 4}",))

def open_stripes(options, *, split, resolution):
    return Stripes(options, split, resolution)
"""


@pytest.fixture(scope="module")
def plugin_python(wheel_python: Path) -> Path:
    """That Python with another package installed beside sdx, which has a source."""
    (site,) = (wheel_python.parents[1] / "lib").glob("python*/site-packages")
    (site / "stripes.py").write_text(PLUGIN)
    info = site / "stripes-1.2.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stripes\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[sdx.plugins]\nstripes = stripes:open_stripes\n")
    return wheel_python


def test_a_plugin_beside_the_wheel_is_trained_on(plugin_python: Path, tmp_path: Path) -> None:
    """Named by an option in the user's own ./conf, with a key changed on the command line."""
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "stripes.yaml").write_text(
        "# @package _global_\ndata:\n  kind: plugin\n  plugin: stripes\n  options: {length: 3}\n"
    )
    short = ["data=stripes", "data.options.length=12", "train.max_steps=1", "sample.every=null"]
    trained = run(plugin_python, tmp_path, *short, "debug=fast")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    (record,) = tmp_path.glob("outputs/*/run.json")
    assert json.loads(record.read_text())["data_fingerprint"] == "stripes 1"
    refused = run(plugin_python, tmp_path, "data=plugin", "data.plugin=strips", "debug=fast")
    assert refused.returncode == 2 and "installed are stripes" in refused.stderr
