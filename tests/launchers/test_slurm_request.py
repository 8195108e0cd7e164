"""What a SLURM job asks for, and what is refused before anything is touched."""

from typing import Any

import pytest

from sdx.config.hydra_keys import for_hydra
from sdx_launchers.slurm.request import Request, job_problems, request_of, settings_problems
from tests.launchers.slurm_jobs import make_job, make_settings, slurm_config

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    "value",
    [
        "$(touch x)",
        "`touch x`",
        "a b",
        "a\n#SBATCH --wrap=x",
        "--wrap=x",
        "-w",
        "",
        "a;touch x",
        "é'",
    ],
)
@pytest.mark.parametrize("key", ["partition", "account", "qos", "constraint"])
def test_only_names_are_names(key: str, value: str) -> None:
    [problem] = settings_problems(make_settings(**{key: value}))
    assert problem.path == f"hydra.launcher.{key}" and problem.got == repr(value)


@pytest.mark.parametrize(
    "given",
    [
        {"partition": "gpu,gpu-long", "account": "proj@v100", "qos": "qos_gpu-t3"},
        {"constraint": "[rack1*2&rack2*4]"},
        {
            "constraint": "a100|h100",
            "additional_parameters": {"mail_type": "END", "begin": "16:00"},
        },
        {"srun_args": ["--mpi=none", "-v"], "setup": ["module load cuda && export A='$B'"]},
        {"command_prefix": ["apptainer", "exec", "--nv", "my image.sif"]},
        {"timeout_min": 1, "signal_delay_s": 15},
        {"additional_parameters": {"gres": "lustre:1"}},
        {"additional_parameters": {"gres": "gpu:a100:8"}, "gpus_per_node": 0},
    ],
)
def test_sound_settings(given: dict[str, Any]) -> None:
    assert list(settings_problems(make_settings(**given))) == []


@pytest.mark.parametrize(
    ("given", "path", "says"),
    [
        ({"additional_parameters": {"--wrap": "x"}}, "additional_parameters", "without dashes"),
        ({"additional_parameters": {"a\nb": "x"}}, "additional_parameters", "name of an option"),
        ({"additional_parameters": {"comment": "a\ntouch x"}}, "additional_parameters.comment", ""),
        ({"additional_parameters": {"time": "5"}}, "additional_parameters", "timeout_min"),
        (
            {"additional_parameters": {"gpus_per_node": "5"}},
            "additional_parameters",
            "gpus_per_node",
        ),
        *(
            ({"additional_parameters": {option: "2"}}, "additional_parameters", key)
            for option, key in [
                ("ntasks", "hydra.launcher.tasks_per_node"),
                ("gpus", "hydra.launcher.gpus_per_node"),
                ("gpus_per_task", "hydra.launcher.gpus_per_node"),
                ("cpus-per-gpu", "hydra.launcher.cpus_per_task"),
                ("mem-per-cpu", "hydra.launcher.mem_gib"),
            ]
        ),
        (
            {"additional_parameters": {"gres": "lustre:1,gpu:a100:8"}},
            "additional_parameters.gres",
            "hydra.launcher.gpus_per_node=0",
        ),
        ({"additional_parameters": {"requeue": "0"}}, "additional_parameters", "sdx's own"),
        ({"srun_args": ["touch", "x"]}, "srun_args", "options"),
        ({"srun_args": ["--a\nb"]}, "srun_args", "one line"),
        ({"setup": ["a\nb"]}, "setup", "one line"),
        ({"command_prefix": ["--nv"]}, "command_prefix", "program"),
        ({"timeout_min": 2, "signal_delay_s": 120}, "signal_delay_s", "timeout_min=2"),
    ],
)
def test_refused_settings(given: dict[str, Any], path: str, says: str) -> None:
    found = [*settings_problems(make_settings(**given))]
    assert found and all(problem.path == f"hydra.launcher.{path}" for problem in found)
    assert says in str(found[0])


@pytest.mark.parametrize(
    ("preset", "hardware", "given", "expected"),
    [
        ("cpu", {}, {}, Request(1, 1, 0)),
        ("gpu_a100_8", {}, {}, Request(1, 1, 8)),
        ("gpu_a100_8", {}, {"tasks_per_node": 8}, Request(1, 8, 8)),
        ("gpu_h100_8x8", {}, {}, Request(8, 1, 8)),
        ("gpu", {}, {"gpus_per_node": 4}, Request(1, 1, 4)),
        ("cpu", {"num_devices": 4, "num_hosts": 2}, {"tasks_per_node": 2}, Request(2, 2, 0)),
        ("cpu", {"num_devices": 4}, {"nodes": 2, "tasks_per_node": 2}, Request(2, 2, 0)),
        ("tpu_v4_32", {"simulate": True}, {}, Request(1, 1, 0)),
        (
            "gpu_a100_8",
            {},
            {"gpus_per_node": 0, "additional_parameters": {"gres": "gpu:8"}},
            Request(1, 1, 0),
        ),
    ],
)
def test_what_is_asked_for(
    preset: str, hardware: dict[str, Any], given: dict[str, Any], expected: Request
) -> None:
    settings, config = make_settings(**given), slurm_config(preset, **hardware)
    assert request_of(settings, config.hardware) == expected
    assert list(job_problems(settings, [make_job(config=config)])) == []


@pytest.mark.parametrize(
    ("preset", "hardware", "given", "path", "says"),
    [
        ("tpu_v4_32", {}, {}, "hardware", "run_on=tpu"),
        ("gpu", {}, {}, "gpus_per_node", "missing"),
        ("gpu_a100_8", {}, {"nodes": 3}, "nodes", "num_devices=8"),
        ("gpu_a100_8", {}, {"gpus_per_node": 4}, "gpus_per_node", "num_devices=8"),
        ("gpu_a100_8", {}, {"gpus_per_node": 0}, "gpus_per_node", "num_devices=8"),
        ("gpu_a100_8", {}, {"tasks_per_node": 3}, "tasks_per_node", "1, 2, 4, 8"),
        ("cpu", {}, {"nodes": 2}, "tasks_per_node", "2 processes"),
        ("tpu_v4_32", {"simulate": True}, {"nodes": 4}, "tasks_per_node", "4 processes"),
    ],
)
def test_hardware_that_no_such_job_has(
    preset: str, hardware: dict[str, Any], given: dict[str, Any], path: str, says: str
) -> None:
    job = make_job(config=slurm_config(preset, **hardware))
    found = {p.path: str(p) for p in job_problems(make_settings(**given), [job])}
    assert says in found[path if path == "hardware" else f"hydra.launcher.{path}"]


@pytest.mark.parametrize("folder", ["a%j", "a\\b", "a\nb"])
def test_folders_that_slurm_would_misread(folder: str) -> None:
    job = make_job(root=make_job().folder / folder)
    assert [p.path for p in job_problems(make_settings(), [job])] == ["run.output_dir"]


@pytest.mark.parametrize(
    ("typed", "given"),
    [
        ("hydra.launcher.additional_parameters={begin: 16:00}", "++"),
        ("hydra.launcher.additional_parameters.begin=now", "++"),
        ("hydra.launcher.setup=[module load cuda]", ""),
        ("optimizer.lr=1e-5,5e-6", ""),
    ],
)
def test_mappings_are_added_to_without_a_plus(typed: str, given: str) -> None:
    assert for_hydra(typed) == f"{given}{typed}"
