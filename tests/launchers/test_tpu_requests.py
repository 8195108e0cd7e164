"""What is asked of Google's API, to the letter, and what keeps it from being asked."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdx.config.compose import compose
from sdx.config.folders import CONF
from sdx.config.launching import Provisioning, TpuSettings
from sdx_launchers.tpu.launcher import TpuLauncher
from sdx_launchers.tpu.requests import (
    Place,
    as_label,
    creation,
    labels,
    new_name,
    self_delete_script,
    spec_of,
)
from tests.launchers.tpu_jobs import make_job, make_settings, tpu_config

GOLDEN = Path(__file__).parent / "golden"
PRESETS = sorted(path.stem for path in (CONF / "run_on").glob("tpu_*.yaml"))


def problems(settings: TpuSettings, *jobs: Any) -> str:
    return "\n".join(str(problem) for problem in TpuLauncher(settings).problems(jobs, None))


CASES = {
    "single": ((), {}),
    "spot_multislice_kept": (
        ("hardware=tpu_v4_32x2",),
        {"provisioning": Provisioning.spot, "keep": True, "self_delete_min": None},
    ),
    "reserved_and_private": (
        ("hardware=tpu_v4_8",),
        {
            "accelerator_type": "v4-8",
            "provisioning": Provisioning.reserved,
            "reservation": "ours",
            "network": "lab",
            "subnetwork": "lab-us",
            "external_ips": False,
            "service_account": "trainer@a-project.iam.gserviceaccount.com",
            "ssh_command": ["gcloud", "ssh", "{node}", "--worker={worker}", "--command={command}"],
            "python": "/opt/python",
            "remote_dir": "/mnt/disk/sdx",
        },
    ),
    "rehearsal": (("hardware=tpu_v4_32", "hardware.simulate=true"), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_shows_every_request_and_command(case: str, tmp_path: Path) -> None:
    overrides, more = CASES[case]
    settings = make_settings(None, tmp_path, **more)
    job = make_job(tmp_path, "lr1e-5", tpu_config(*overrides))
    text = TpuLauncher(settings).describe([job], None).replace(str(tmp_path), "ROOT") + "\n"
    golden = GOLDEN / f"tpu_{case}.txt"
    if os.environ.get("SDX_UPDATE_GOLDEN") == "1":
        golden.write_text(text)
    assert text == golden.read_text()


INJECTIONS = ["$(touch x)", "`touch x`", "a\nb", "--flag", "a b", "a;b", "'", "ä"]
NAMES = [
    "project", "zone", "accelerator_type", "runtime_version", "reservation", "network",
    "subnetwork", "service_account", "owner", "api_endpoint",
]  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize("text", INJECTIONS)
def test_what_is_no_name_is_refused(text: str, tmp_path: Path) -> None:
    """All of them at once."""
    given = dict.fromkeys(NAMES, text)
    said = problems(make_settings(None, tmp_path, provisioning=Provisioning.reserved, **given))
    assert [name for name in NAMES if f"hydra.launcher.{name}={text!r}: must be" not in said] == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"zone": None}, "hydra.launcher.zone=null: missing"),
        ({"accelerator_type": None}, "hydra.launcher.accelerator_type=null: missing"),
        ({"runtime_version": None}, "hydra.launcher.runtime_version=null: missing"),
        ({"reservation": "ours"}, "is of reserved TPUs; add hydra.launcher.provisioning=reserved"),
        ({"accelerator_type": "v4-64"}, "v4-64: has 32 devices, hardware=tpu_v4_32 wants 16 in 1"),
        ({"mounts": ["/nowhere/at/all"]}, "hydra.launcher.mounts=/nowhere/at/all: is not here"),
        ({"mounts": ["here"]}, "hydra.launcher.mounts=here: must be an absolute path"),
        ({"mounts": []}, "is a local folder, and the workers of a TPU share no disk; use gs://"),
        ({"ssh_key": "/no/key"}, "hydra.launcher.ssh_key=/no/key: there is no such file"),
    ],
)
def test_settings_that_cannot_be_are_said_before_anything(
    given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    assert said in problems(make_settings(None, tmp_path, **given), make_job(tmp_path))


@pytest.mark.fast
@pytest.mark.parametrize("name", ["a%b", 'a"b', "a\\b", "a${HOME}"])
def test_names_that_ssh_would_misread(name: str, tmp_path: Path) -> None:
    settings, job = make_settings(None, tmp_path), make_job(tmp_path, name)
    assert f"run.name={str(job.folder)!r}: ssh" in problems(settings, job)
    gcloud = ["gcloud", "ssh", "{node}", "--command={command}"]
    assert "ssh notes" not in problems(replace(settings, ssh_command=gcloud), job)
    below = make_job(tmp_path / name)
    assert f"run.output_dir={str(below.folder)!r}: ssh" in problems(settings, below)


def test_sound_settings_have_no_problems(tmp_path: Path) -> None:
    settings = make_settings(None, tmp_path)
    assert problems(settings, make_job(tmp_path)) == ""
    in_store = replace(tpu_config().run, output_dir="gs://bucket/runs")
    job = make_job(tmp_path)
    job = replace(job, config=replace(job.config, run=in_store))
    assert problems(replace(settings, mounts=[]), job) == ""


def test_jobs_that_are_not_for_tpus_are_said(tmp_path: Path) -> None:
    settings = make_settings(None, tmp_path)
    cpu = make_job(tmp_path, config=tpu_config("hardware=cpu"))
    assert "hardware=cpu: is not a TPU" in problems(settings, cpu)
    unknown = make_job(tmp_path, config=tpu_config("hardware=tpu"))
    assert "hardware.num_devices=null: must be known" in problems(settings, unknown)
    two = make_job(tmp_path, "b", tpu_config("hardware=tpu_v4_32x2"))
    assert "must be the same for all jobs" in problems(settings, make_job(tmp_path), two)
    encode = make_job(tmp_path, command="encode")
    assert "data.cache_dir=~/.cache/sdx/data: is a folder of each worker" in problems(
        settings, encode
    )


def test_a_project_is_asked_for_where_credentials_name_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("google.auth.default", lambda: (None, None))
    said = problems(make_settings(None, tmp_path, project=None), make_job(tmp_path))
    assert "hydra.launcher.project=null: your credentials name none; give" in said
    monkeypatch.setattr("google.auth.default", lambda: (None, "from-credentials"))
    settings = make_settings(None, tmp_path, project=None)
    assert problems(settings, make_job(tmp_path)) == ""
    text = TpuLauncher(settings).describe([make_job(tmp_path)], None)
    assert "projects/from-credentials/locations" in text


def test_a_missing_library_is_named_with_sdx_s_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "google.cloud.tpu_v2", None)
    assert "pip install 'sdx[cloud-tpu]'" in problems(
        make_settings(None, tmp_path), make_job(tmp_path)
    )


@pytest.mark.fast
def test_every_described_tpu_has_its_run_on() -> None:
    described = {path.stem for path in (CONF / "hardware").glob("tpu_*.yaml")}
    assert {*PRESETS} == described


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_ask_for_the_tpus_of_their_hardware(preset: str, tmp_path: Path) -> None:
    text = (CONF / "run_on" / f"{preset}.yaml").read_text()
    found = dict(re.findall(r"^    (accelerator_type|runtime_version): (\S+)$", text, re.M))
    config = compose([f"run_on={preset}", "model=tiny"])
    assert config.hardware.name == preset
    settings = make_settings(None, tmp_path, **found)
    assert problems(settings, make_job(tmp_path, config=config)) == ""


@pytest.mark.fast
@pytest.mark.parametrize("owner", ["ann", "a_b", "0", "x" * 63])
def test_names_are_new_and_say_whose(owner: str) -> None:
    first, second = new_name(owner), new_name(owner)
    assert first != second
    assert re.fullmatch(r"sdx-[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?-[0-9a-f]{8}", first)


@pytest.mark.fast
def test_labels_hold_what_google_allows() -> None:
    made = labels("ann", "My sweep/ß", "holder", 12.7, shape="s", keep=True)
    assert made["sdx-sweep"] == "my-sweep--"
    assert made["sdx-lease"] == "12"
    assert len(as_label("x" * 100)) == 63


@pytest.mark.fast
def test_only_the_same_kind_stands_for_another(tmp_path: Path) -> None:
    base = spec_of(make_settings(None, tmp_path), 1)
    others: list[dict[str, Any]] = [
        {"accelerator_type": "v4-8"},
        {"runtime_version": "other"},
        {"num_slices": 2},
        {"provisioning": Provisioning.spot},
        {"network": "lab"},
        {"external_ips": False},
        {"service_account": "a@b.c"},
    ]
    shapes = [base.shape, *(replace(base, **other).shape for other in others)]
    assert len(set(shapes)) == len(shapes)
    assert spec_of(make_settings(None, tmp_path, owner="bob"), 1).shape == base.shape


@pytest.mark.fast
def test_requests_are_what_the_api_knows(tmp_path: Path) -> None:
    """Its own messages take them, and nothing is lost on the way."""
    import json

    from google.cloud import tpu_v2

    settings = make_settings(None, tmp_path, **CASES["reserved_and_private"][1])
    marked = labels("ann", "s", "h", 1, shape="s", keep=False)
    request = creation(Place("p", "z"), "name", spec_of(settings, 1), marked, 60)
    message = tpu_v2.CreateQueuedResourceRequest.from_json(json.dumps(request))
    options = {"always_print_fields_with_no_presence": False, "preserving_proto_field_name": False}
    back = tpu_v2.CreateQueuedResourceRequest.to_dict(message, **options)
    request["queuedResource"]["tpu"]["nodeSpec"][0]["node"]["networkConfig"].pop(
        "enableExternalIps"  # false is what is not said
    )
    assert back == request


FAKES = {
    "curl": """case "$*" in
        *DELETE*) echo "$@" >> $LOG; cat >> $LOG; exit $CODE;;
        *) echo "$TOKEN";;
    esac""",
    "shutdown": 'echo shutdown "$@" >> $LOG',
    "sleep": ":",
}


@pytest.mark.fast
@pytest.mark.parametrize("code", [0, 22])
def test_a_machine_deletes_its_tpu_by_itself(code: int, tmp_path: Path) -> None:
    """With the token of its service account, which is in no argument; else it shuts down."""
    script = self_delete_script(Place("a-project", "us-central2-b"), "sdx-ann-1", 0.0)
    assert script is not None and "/var/lib/sdx-delete-at" in script
    script = script.replace("/var/lib/sdx-delete-at", str(tmp_path / "at")).replace(
        "2>&1 &", "2>&1"
    )
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(log),
        "CODE": str(code),
        "TOKEN": '{"access_token" : "secret", "expires_in": 1}',
    }
    subprocess.run(["sh", "-c", script], env=environment, check=True)
    lines = log.read_text().splitlines()
    assert lines[0].endswith(
        "https://tpu.googleapis.com/v2/projects/a-project/locations/us-central2-b/queuedResources/"
        "sdx-ann-1?force=true"
    )
    assert "secret" not in lines[0] and lines[1] == "Authorization: Bearer secret"
    assert lines[-1] == "shutdown -h now"
    assert len(lines) == 2 * (1 if code == 0 else 5) + 1
