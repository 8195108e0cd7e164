"""The command that plans: real targets from this machine, exit codes, start-up."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from sdx.plan import main

SECONDS = 10.0


def python(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, where nothing has started JAX."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=repository, capture_output=True, text=True
    )


def cpu_s() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_sd21_on_a_pod_slice(repository: Path) -> None:
    before = cpu_s()
    typed = ("model=sd21", "hardware=tpu_v4_32", "data=pokemon", "report=json")
    done = python(repository, "-m", "sdx.plan", *typed)
    assert (done.returncode, done.stderr) == (0, "")
    assert cpu_s() - before < SECONDS
    found = json.loads(done.stdout)  # nothing else on standard output
    assert found["parameters"] == 865_910_724 and found["num_hosts"] == 4
    assert found["fits"] == "yes"


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hardware=tpu_v5e_8", "mesh=dp", "hardware.hbm_gib=0.3"]) == 3
    told = capsys.readouterr().out
    assert "fits          no" in told and "it fits with" in told
    assert main(["hardware=tpu_v5e_8", "mesh=dp", "report=json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] == "yes"
    assert main(["hardware=gpu"]) == 2
    assert "give hardware.num_devices=N" in capsys.readouterr().err
    assert main(["hardware=tpu_v5e_8", "mesh.ici.fsdp=3"]) == 2
    assert main(["compile=maybe", "modle=tiny"]) == 2
    refused = capsys.readouterr().err
    assert "compile=maybe: must be true or false" in refused and "did you mean model" in refused


def test_every_job_of_a_sweep_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    swept = ["--multirun", "hardware=tpu_v5e_8,tpu_v4_8", "report=json"]
    assert main(swept) == 0
    captured = capsys.readouterr()
    names = [json.loads(line)["hardware"] for line in captured.out.splitlines()]
    assert names == ["tpu_v5e_8", "tpu_v4_8"] and "job 2 of 2" in captured.err
    assert main(["--multirun", "hardware=tpu_v5e_8", "hardware.hbm_gib=0.3,16"]) == 3


@pytest.mark.fast
def test_jax_is_not_imported_before_it_is_needed(repository: Path) -> None:
    script = "import sys, sdx.plan; sdx.plan.main(['--help']); sys.exit('jax' in sys.modules)"
    done = python(repository, "-c", script)
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "python -m sdx.plan" in told and " plan what a configuration needs" in told
    for key in (
        "compile Compile",
        "true, false",
        "text, json",
        "optimization_level XLA",
        "O0, O1, O2, O3",
    ):
        assert key in told


@pytest.mark.fast
def test_nothing_is_rehearsed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hardware=tpu_v4_8", "hardware.simulate=true"]) == 2
    told = capsys.readouterr().err
    assert "hardware.simulate=true: sdx.plan is about the hardware itself" in told
    assert "use hardware.simulate=false" in told, "--from of a rehearsal brings it untyped"


def test_the_exit_code_tells_though_nobody_reads(repository: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    typed = ("hardware=tpu_v5e_8", "mesh=dp", "hardware.hbm_gib=0.3")
    done = subprocess.run(
        [sys.executable, "-m", "sdx.plan", *typed],
        cwd=repository,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (3, "")
