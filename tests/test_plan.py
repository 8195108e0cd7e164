"""The command that plans: real targets from this machine, exit codes, start-up."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sdx.plan import main


def python(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, where nothing has started JAX."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=repository, capture_output=True, text=True
    )


def test_sd21_on_a_pod_slice(repository: Path) -> None:
    done = python(repository, "-m", "sdx.plan", "model=sd21", "hardware=tpu_v4_32")
    assert (done.returncode, done.stderr) == (0, "")
    for part in (
        "sd21 on tpu_v4_32",
        "16 on 4 hosts, mesh data 1 x fsdp 16 x tensor 1",
        "865,910,724 parameters, trained",
        "83,653,863 parameters, frozen",
        "340,387,840 parameters, frozen",
        "of 32.00 GiB, activations not counted",
        "undecided: activations",
    ):
        assert part in done.stdout
    (share,) = [line for line in done.stdout.splitlines() if "of the state's bytes" in line]
    assert float(share.split()[1].rstrip("%")) >= 99.9


@pytest.mark.fast
def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    jax.devices()  # before the plan claims more than the other tests have
    assert main(["hardware=tpu_v5e_8", "mesh=dp", "hardware.hbm_gib=0.001"]) == 3
    assert "no, even without activations; mesh=fsdp spreads" in capsys.readouterr().out
    assert main(["hardware=gpu"]) == 2
    assert "give hardware.num_devices=N" in capsys.readouterr().err
    assert main(["hardware=tpu_v5e_8", "mesh.ici.fsdp=3"]) == 2


@pytest.mark.fast
def test_jax_is_not_imported_before_it_is_needed(repository: Path) -> None:
    script = "import sys, sdx.plan; sdx.plan.main(['--help']); sys.exit('jax' in sys.modules)"
    done = python(repository, "-c", script)
    assert done.returncode == 0, done.stderr
    assert "python -m sdx.plan" in done.stdout and "plan    what" in done.stdout
