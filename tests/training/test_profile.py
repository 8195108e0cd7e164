"""A trace has the steps that were asked for, and TensorBoard's profile plugin reads it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData
from tensorboard.plugins.base_plugin import TBContext
from xprof.convert import raw_to_tool_data
from xprof.profile_plugin import ProfilePlugin

from sdx.config.schema import ProfilerConfig
from sdx.record.store import AnyPath, as_path, local_copy
from sdx.training.profile import STEP, StepTracer


@jax.jit
def matrix_work(x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ x)


def train(tracer: StepTracer, first: int, last: int) -> None:
    """Steps `first` to `last`, as the loop makes them."""
    x = jnp.ones((64, 64))
    for step in range(first, last + 1):
        with tracer.step(step):
            x = matrix_work(x)
        tracer.done(x)
    tracer.close()


def traces(folder: Path) -> list[str]:
    """Where the plugin looks for them."""
    return [str(path) for path in sorted(folder.glob("plugins/profile/*/*.xplane.pb"))]


def steps_in(trace: str) -> list[int]:
    lines = [line for plane in ProfileData.from_file(trace).planes for line in plane.lines]
    events = [event for line in lines for event in line.events if event.name == STEP]
    return sorted(int(dict(event.stats)["step_num"]) for event in events)


def tracer_of(folder: AnyPath, said: list[str], skip: int = 2, steps: int = 3) -> StepTracer:
    return StepTracer(
        ProfilerConfig(enabled=True, skip_steps=skip, steps=steps), folder, said.append
    )


def test_the_asked_steps_of_this_start_are_traced_and_the_plugin_reads_them(tmp_path: Path) -> None:
    said: list[str] = []
    train(tracer_of(tmp_path / "1", said), 101, 110)  # went on from step 100
    train(tracer_of(tmp_path / "2", said), 111, 115)  # and once more
    assert said == [f"profile: 3 steps in {tmp_path / number}" for number in ("1", "2")]
    [trace] = traces(tmp_path / "1")
    assert steps_in(trace) == [103, 104, 105]
    assert steps_in(*traces(tmp_path / "2")) == [113, 114, 115]
    assert "trace_viewer@" in raw_to_tool_data.xspace_to_tool_names([trace])
    assert {*plugin(tmp_path).generate_runs()} == {run_of(tmp_path, n) for n in ("1", "2")}
    events = shown(trace)
    assert {f"{STEP} {step}" for step in (103, 104, 105)} <= {event.get("name") for event in events}
    assert any(
        "tanh" in event.get("name", "") or "dot" in event.get("name", "") for event in events
    )


def plugin(folder: Path) -> ProfilePlugin:
    """TensorBoard's plugin, as `tensorboard --logdir FOLDER` starts it."""
    flags = SimpleNamespace(master_tpu_unsecure_channel="", num_workers=0)
    return ProfilePlugin(TBContext(logdir=str(folder), flags=flags))


def run_of(folder: Path, attempt: str) -> str:
    """What the plugin calls the trace of that attempt."""
    [trace] = traces(folder / attempt)
    return f"{attempt}/{Path(trace).parent.name}"


def shown(trace: str) -> list[dict[str, Any]]:
    """What the plugin's trace viewer is given."""
    content, kind = raw_to_tool_data.xspace_to_tool_data([trace], "trace_viewer", {})
    assert kind == "application/json"
    return json.loads(content)["traceEvents"]


def test_a_trace_that_is_cut_short_is_whole(tmp_path: Path) -> None:
    said: list[str] = []
    train(tracer_of(tmp_path, said, steps=50), 1, 4)
    assert steps_in(*traces(tmp_path)) == [3, 4]
    assert said == [f"profile: 2 of 50 steps in {tmp_path}"]


def test_too_few_steps_are_said_and_leave_no_trace_open(tmp_path: Path) -> None:
    said: list[str] = []
    train(tracer_of(tmp_path / "none", said), 9, 10)
    assert said == ["profile: no trace, this start made 2 steps, profiler.skip_steps=2"]
    assert not (tmp_path / "none").exists()
    train(tracer_of(tmp_path / "next", said, skip=1, steps=1), 1, 2)  # only one can be open
    assert steps_in(*traces(tmp_path / "next")) == [2]


def test_a_trace_goes_to_the_store_that_the_run_lies_in(bucket: str) -> None:
    said: list[str] = []
    place = as_path(f"{bucket}/run/profile/1")
    train(tracer_of(place, said), 1, 5)
    assert said == [f"profile: 3 steps in {place}"]
    with local_copy(place) as here:
        assert steps_in(*traces(here)) == [3, 4, 5]


@pytest.mark.fast
def test_off_and_on_other_processes_nothing_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    train(StepTracer(ProfilerConfig(), tmp_path / "off", said.append), 1, 9)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    train(tracer_of(tmp_path / "other", said), 1, 9)
    assert not said and not list(tmp_path.iterdir())
