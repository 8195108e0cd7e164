"""What is on record of one run, read while it runs, resumes or is half written.

A record that cannot be read is a fact like others: `faults` says what is wrong, and the rest is
told as far as it is known. No scheduler is asked here.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import yaml

from sdx.record.files import read_json
from sdx.record.metrics import read_column
from sdx.record.owner import Owner, lives_here
from sdx.record.redact import said_by
from sdx.record.status import Status, read_status
from sdx.record.store import AnyPath
from sdx_launchers.launch_record import CONFIG, read_launch, read_outcome
from sdx_launchers.runs.found import Found, FoundRun
from sdx_launchers.sweep.objective import Value

NEW, UNREADABLE = "new", "unreadable"
"""What a run is called that nothing was started of, or whose status cannot be read."""
_READS_AT_ONCE = 16
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast


@dataclass
class RunFacts:
    """One run as its record tells of it; `config` is flat: values by dotted path."""

    found: FoundRun
    status: str = NEW
    reason: str | None = None
    step: int = 0
    max_steps: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    created: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)
    launch: Mapping[str, Any] = field(default_factory=dict)
    attempts: list[Mapping[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    columns: dict[str, list[Value]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def goes_on(self) -> bool:
        """Whether it runs or waits for its turn."""
        return self.status in (Status.running.name, Status.queued.name)

    def column(self, metric: str) -> list[Value]:
        """The values of a metric, read when they are asked for first."""
        if metric not in self.columns:
            self.columns[metric] = []
            with _noting(self, "metrics.jsonl"):
                rows = read_column(self.found.paths.metrics, metric)
                self.columns[metric] = [Value(step, value) for step, value in rows]
        return self.columns[metric]

    @property
    def wall_s(self) -> float | None:
        """Seconds of all its starts together; None before the first."""
        spans = [span for attempt in self.attempts if (span := self._span(attempt)) is not None]
        return sum(spans) if spans else None

    @property
    def where(self) -> str:
        """Scheduler, its name of the job, and nodes; or the host."""
        attempt = self.attempts[-1] if self.attempts else {}
        ids = attempt.get("scheduler") or {}
        launcher = str(self.launch.get("launcher") or "").removeprefix("sdx_")
        if "SLURM_JOB_ID" in ids:
            job = ids["SLURM_JOB_ID"]
            if "SLURM_ARRAY_JOB_ID" in ids:
                job = f"{ids['SLURM_ARRAY_JOB_ID']}_{ids.get('SLURM_ARRAY_TASK_ID', '')}"
            return f"slurm {job} {ids.get('SLURM_JOB_NODELIST', '')}".strip()
        if launcher not in ("", "local"):
            return f"{launcher} {ids.get('SDX_NODES') or self.launch.get('id', '')}".strip()
        return str(attempt.get("host") or launcher)

    def _span(self, attempt: Mapping[str, Any]) -> float | None:
        started, ended = _time(attempt.get("started")), _time(attempt.get("ended"))
        if started is None:
            return None
        if ended is None:  # it runs, or was cut off: then its last sign of life counts
            is_last = attempt is self.attempts[-1]
            running = is_last and self.status == Status.running.name
            ended = datetime.now(UTC) if running else _time(self.record.get("updated"))
        return None if ended is None else max(0.0, (ended - started).total_seconds())


def read_runs(found: Found, known: Iterable[RunFacts] = ()) -> list[RunFacts]:
    """The facts of every run, in order; of `known` ones that have ended only their status is looked
    at."""
    ended = {facts.name: facts for facts in known if not facts.goes_on and not facts.faults}
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        return list(pool.map(lambda run: _read_run(run, ended.get(run.name)), found.runs))


def read_columns(runs: Iterable[RunFacts], metric: str) -> None:
    """Reads a metric of all runs, several at a time."""
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        list(pool.map(lambda facts: facts.column(metric), runs))


def _read_run(run: FoundRun, known: RunFacts | None) -> RunFacts:
    facts = RunFacts(run, overrides=run.overrides or ())
    with _noting(facts, "launch.json"):
        facts.launch = (run.launch and read_launch(run.launch)) or {}
    with _noting(facts, "status.json"):
        facts.status = UNREADABLE
        _read_status(facts)
    if known is not None and _ending(known) == _ending(facts):
        return known
    with _noting(facts, "run.json"):
        _read_record(facts)
    with _noting(facts, "attempts"):
        facts.attempts = _attempts(run.paths.attempts)
    return facts


def _ending(facts: RunFacts) -> tuple[object, ...]:
    return facts.status, facts.step, facts.record.get("updated"), facts.launch


def _read_status(facts: RunFacts) -> None:
    """The run's own word first; a launcher's where the run says nothing."""
    run, launch = facts.found, facts.launch
    outcome = read_outcome(run.launch) if run.launch else None
    own = read_status(run.paths) if run.command == "train" else None
    if own is None:
        waits = Status.queued.name if _waits(launch) else NEW
        facts.status = waits if outcome is None else outcome.status.name
        facts.reason = None if outcome is None else outcome.reason
        return
    facts.step, facts.record = own.step, {"updated": own.updated}
    has_ended = own.status not in (Status.running, Status.finished)
    if has_ended and outcome is None and _waits(launch, since=own.updated):
        facts.status = Status.queued.name  # handed over once more
        return
    facts.status = own.status.name
    facts.reason = own.reason or (outcome.reason if has_ended and outcome else None)


def _waits(launch: Mapping[str, Any], since: str = "") -> bool:
    """Whether a job that was handed over after the run's last word may still begin."""
    process = launch.get("process")
    if not launch or launch.get("submitted", "") < since:
        return False
    return process is None or lives_here(Owner(**process)) is not False


def _read_record(facts: RunFacts) -> None:
    run = facts.found
    record = read_json(run.paths.run)
    if record is not None:
        facts.record = {**record, **facts.record}
        facts.config = flat(record.get("config") or {})
        facts.overrides = facts.overrides or tuple(record.get("overrides") or ())
        facts.created = str(record.get("created") or "")
    elif run.launch is not None and (run.launch / CONFIG).is_file():
        facts.config = flat(yaml.load(_text(run.launch / CONFIG), _LOADER) or {})
    steps = facts.config.get("train.max_steps") if run.command == "train" else None
    facts.max_steps = steps if isinstance(steps, int) else None


def _attempts(folder: AnyPath) -> list[Mapping[str, Any]]:
    if not folder.is_dir():
        return []
    numbers = sorted(int(p.stem) for p in folder.glob("*.json") if p.stem.isdecimal())
    return [read_json(folder / f"{number}.json") or {} for number in numbers]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted path; empty mappings count as values."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else None
        values |= {f"{prefix}{name}": value} if inner is None else inner
    return values


@contextmanager
def _noting(facts: RunFacts, what: str) -> Iterator[None]:
    """A record that cannot be read becomes a fault of the run."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        text = said_by(error)
        fault = text if what in text else f"{what}: {text}"
        if fault not in facts.faults:
            facts.faults.append(fault)


def _text(path: AnyPath) -> str:
    return path.read_text("utf-8", "replace")


def _time(text: object) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text))
    except ValueError:
        return None
