"""A search as it is typed, with the real trainer: pruned, killed, gone on with."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdx.config.launching import SearchSampler, SearchSettings
from sdx_launchers.search.space import read_space
from sdx_launchers.search.study import Study
from sdx_launchers.sweep.objective import Objective
from tests.launchers.test_local import descendants, is_alive, num_rows, sweep, wait_until

# Judged by its rate, so that nothing depends on noise: the bad trial is worse from its first step,
# and would take hours. Good ones differ in their seed, which costs no compilation; they have the
# rate of other tests' runs, whose programs are in the cache.
GOOD, BAD = (1.5e-3, "3"), (3e-4, "1000000")
VALUES = [
    "run.seed=1,2,3,4",
    f"optimizer.lr={GOOD[0]},{GOOD[0]},{GOOD[0]},{BAD[0]}",
    f"train.max_steps={GOOD[1]},{GOOD[1]},{GOOD[1]},{BAD[1]}",
]
ZIP = "run.seed+optimizer.lr+train.max_steps"
THE_BAD = "4"


def seed_of(overrides: Sequence[str]) -> str:
    [seed] = [text.partition("=")[2] for text in overrides if text.startswith("run.seed=")]
    return seed


def order_of_trials(seed: int) -> list[str]:
    """The runs' seeds in the order in which the search with that seed asks them."""
    space, _ = read_space({}, VALUES, [ZIP])
    settings = SearchSettings(sampler=SearchSampler.random, seed=seed)
    study = Study(None, space, settings, Objective("lr"))
    return [seed_of(space.overrides(study.ask().values)) for _ in range(4)]


def with_the_bad_one_third(seed: int) -> bool:
    order = order_of_trials(seed)
    return order[2] == THE_BAD and len(set(order)) == 4


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_search_prunes_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    seed = next(number for number in range(10_000) if with_the_bad_one_third(number))
    typed = [
        "hydra/sweeper=sdx_search", *VALUES, f"hydra.sweeper.zip=[{ZIP}]", "sample.every=null",
        "hydra.sweeper.n_trials=4", "hydra.sweeper.sampler=random", "hydra.sweeper.name=mine",
        f"hydra.sweeper.seed={seed}", "hydra.sweeper.objective=lr:max",
        "hydra.sweeper.n_startup_trials=2", "hydra.launcher.poll_s=0.2",
    ]  # fmt: skip
    folder = tmp_path / "outputs" / "sweeps" / "mine"

    def jobs() -> list[dict[str, Any]]:
        return read(folder / "sweep.json")["jobs"] if (folder / "sweep.json").exists() else []

    with sweep(tmp_path, *typed) as process:
        wait_until(lambda: len(jobs()) == 3 and num_rows(Path(jobs()[2]["run"])), process)
        family = descendants(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        assert process.stdout is not None
        wait_until(lambda: not any(is_alive(pid) for pid in family))
    assert len(jobs()) == 3
    with sweep(tmp_path, *typed) as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "4 of 4 trials: 3 complete, 1 pruned" in output, output
    assert "best: trial 0, lr 0.0015" in output
    assert [seed_of(job["overrides"]) for job in jobs()] == order_of_trials(seed)
    states = [read(Path(job["run"]) / "status.json")["status"] for job in jobs()]
    assert states == ["finished", "finished", "pruned", "finished"]
    assert read(folder / "summary.json")["best"] == jobs()[0]["name"]
    pruned = Path(jobs()[2]["run"])
    step = read(pruned / "status.json")["step"]
    assert (pruned / "checkpoints" / str(step)).is_dir()
    assert [len(list(Path(job["run"]).glob("attempts/*.json"))) for job in jobs()][:2] == [1, 1]
    with sweep(tmp_path, *typed) as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "->" not in output.partition("so far")[2], output
