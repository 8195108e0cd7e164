"""The memory of a search: a study of Optuna's in a journal that one process at a time writes.

What a search asks next depends on its seed, the number of the trial and what is known by then, not
on how often it was cut off.
"""

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdx.config.errors import ConfigError, Problem
from sdx.config.launching import Pruner, SearchSampler, SearchSettings
from sdx.config.leaves import spelled
from sdx_launchers.search.space import Choices, Space, Value
from sdx_launchers.sweep.objective import Objective

if TYPE_CHECKING:
    import optuna

_NAME = "search"
_SPREAD = 1_000_003  # so that neighbouring seeds share no trial
# attributes of trials and of the study
_RETRY_OF, _ASKED, _RUN, _CANCELLED = "retry_of", "asked", "run", "cancelled"


class Trial:
    """One choice of values, asked and not yet answered."""

    def __init__(self, study: "Study", of_optuna: "optuna.Trial"):
        self._study = study
        self._trial = of_optuna
        self.number = of_optuna.number
        self.values: dict[str, Value] = {
            axis.name: _suggest(of_optuna, axis) for axis in study.space.axes
        }
        self._told = set(study.frozen(self.number).intermediate_values)

    @property
    def run(self) -> str | None:
        """The name of its run, None before `note_run`."""
        return self._trial.user_attrs.get(_RUN)

    def describe(self) -> str:
        """Number and values, on one line."""
        values = " ".join(
            str(value) if "+" in name else f"{name}={spelled(value)}"
            for name, value in self.values.items()
        )
        return f"trial {self.number}: {values}"

    def note_run(self, name: str) -> None:
        self._trial.set_user_attr(_RUN, name)

    def report(self, step: int, value: float | None) -> bool:
        """Tells the objective after `step`, None where it was not finite; whether that is news."""
        if step in self._told:
            return False
        self._told.add(step)
        self._trial.report(self._study.worst if value is None else value, step)
        return True

    def should_prune(self) -> bool:
        """Whether it does worse than the others did, by what was reported last."""
        settings = self._study.settings
        if not self._told or max(self._told) < settings.pruning_warmup_steps:
            return False
        if self._study.num_complete < max(1, settings.n_startup_trials):
            return False
        return self._trial.should_prune()

    def complete(self, value: float) -> None:
        self._study.tell(self.number, value, "COMPLETE")

    def prune(self) -> None:
        self._study.tell(self.number, None, "PRUNED")

    def fail(self) -> None:
        self._study.tell(self.number, None, "FAIL")

    def cancel(self) -> None:
        """Ended by a person, which Optuna has no state for."""
        self._trial.set_user_attr(_CANCELLED, True)
        self.fail()


class Study:
    """All trials of a search; without a `journal` it forgets them.

    Raises ConfigError where the journal is of another search.
    """

    def __init__(
        self, journal: Path | None, space: Space, settings: SearchSettings, objective: Objective
    ):
        self._optuna = _import_optuna()
        self.space = space
        self.settings = settings
        self.worst = -math.inf if objective.is_max else math.inf
        direction = "maximize" if objective.is_max else "minimize"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            self._study = self._optuna.create_study(
                storage=None if journal is None else self._storage(journal),
                study_name=_NAME,
                direction=direction,
                pruner=self._pruner(),
                load_if_exists=True,
            )
        self._check_same({"space": space.describe(), "objective": str(objective)}, journal)

    @property
    def num_trials(self) -> int:
        """Trials asked so far; one that is tried again counts once."""
        retried = self._retried()
        return sum(
            trial.number not in retried and trial.state.name != "WAITING"
            for trial in self._trials()
        )

    @property
    def num_complete(self) -> int:
        return len(self._trials("COMPLETE"))

    def ask(self) -> Trial:
        """The next trial."""
        self._study.sampler = self._sampler(len(self._trials()))
        return Trial(self, self._study.ask())

    def running(self) -> list[Trial]:
        """Trials that were asked by a process before this one, and never answered."""
        optuna, found = self._optuna, self._trials("RUNNING")
        return [Trial(self, optuna.Trial(self._study, trial._trial_id)) for trial in found]

    def retry_failed(self) -> None:
        """The trials that failed or were cancelled are the next to be asked, each once more."""
        retried = self._retried()
        for trial in self._trials("FAIL"):
            if trial.number not in retried:
                attributes = {_RETRY_OF: trial.number}
                self._study.enqueue_trial(trial.params, user_attrs=attributes)

    def best(self) -> tuple[int, float, Mapping[str, Value]] | None:
        """Number, value and values of the best trial; None before any was complete."""
        if not self.num_complete:
            return None
        best = self._study.best_trial
        assert best.value is not None
        return best.number, best.value, best.params

    def counts(self) -> dict[str, int]:
        """How many trials are in which state, by Optuna's names in small letters, or cancelled; of
        one that was tried again the last state counts."""
        retried = self._retried()
        trials = [trial for trial in self._trials() if trial.number not in retried]
        states = [
            _CANCELLED
            if trial.state.name == "FAIL" and _CANCELLED in trial.user_attrs
            else trial.state.name.lower()
            for trial in trials
        ]
        return {state: states.count(state) for state in dict.fromkeys(states)}

    def runs(self) -> dict[str, Mapping[str, Value]]:
        """What the trials chose, by name of the run."""
        named = [trial for trial in self._trials() if _RUN in trial.user_attrs]
        return {trial.user_attrs[_RUN]: trial.params for trial in named}

    def frozen(self, number: int) -> "optuna.trial.FrozenTrial":
        return self._trials()[number]

    def tell(self, number: int, value: float | None, state: str) -> None:
        self._study.tell(number, value, self._optuna.trial.TrialState[state])

    def _trials(self, *states: str) -> "list[optuna.trial.FrozenTrial]":
        wanted = [self._optuna.trial.TrialState[name] for name in states]
        return self._study.get_trials(deepcopy=False, states=wanted or None)

    def _retried(self) -> set[int]:
        attributes = (trial.user_attrs for trial in self._trials())
        return {each[_RETRY_OF] for each in attributes if _RETRY_OF in each}

    def _storage(self, journal: Path) -> Any:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        _mend(journal)
        lock: Any = _HeldBySweep()
        return JournalStorage(JournalFileBackend(str(journal), lock))

    def _sampler(self, number: int) -> Any:
        """A sampler of its own for each trial: one that is seeded once begins anew with every
        process, and asks the first trials again."""
        samplers, settings = self._optuna.samplers, self.settings
        seed = (settings.seed * _SPREAD + number) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            match settings.sampler:
                case SearchSampler.random:
                    return samplers.RandomSampler(seed=seed)
                case SearchSampler.qmc:  # one sequence, which the journal counts
                    first = samplers.RandomSampler(seed=seed)
                    return samplers.QMCSampler(
                        scramble=True, seed=settings.seed, independent_sampler=first
                    )
                case SearchSampler.tpe:
                    return samplers.TPESampler(
                        n_startup_trials=settings.n_startup_trials, seed=seed
                    )

    def _pruner(self) -> Any:
        pruners = self._optuna.pruners
        match self.settings.pruner:
            case Pruner.none:
                return pruners.NopPruner()
            case Pruner.median:
                return pruners.MedianPruner(n_startup_trials=0)
            case Pruner.hyperband:
                return pruners.HyperbandPruner(
                    min_resource=max(1, self.settings.pruning_warmup_steps)
                )

    def _check_same(self, asked: Mapping[str, str], journal: Path | None) -> None:
        there = self._study.user_attrs.get(_ASKED)
        if there is None:
            self._study.set_user_attr(_ASKED, dict(asked))
            return
        problems = [
            Problem("hydra.sweeper.name", journal and journal.parent.name, rule, "use another name")
            for key in asked
            if there.get(key) != asked[key]
            for rule in [f"searched another {key} before: {there.get(key)!r}"]
        ]
        if problems:
            raise ConfigError(problems)


def check_installed() -> list[Problem]:
    """What is wrong where there is no Optuna."""
    try:
        _import_optuna()
    except ConfigError as error:
        return error.problems
    return []


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        rule, fix = "needs Optuna, which is not installed", "pip install 'sdx[search]'"
        raise ConfigError([Problem("hydra/sweeper", "sdx_search", rule, fix)]) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _suggest(trial: "optuna.Trial", axis: Any) -> Value:
    """The trial's value on `axis`; the same when asked again."""
    if isinstance(axis, Choices):
        return trial.suggest_categorical(axis.name, list(axis.options))
    if axis.is_whole:
        step = int(axis.step or 1)
        return trial.suggest_int(
            axis.name, int(axis.low), int(axis.high), step=step, log=axis.is_log
        )
    return trial.suggest_float(axis.name, axis.low, axis.high, step=axis.step, log=axis.is_log)


def _mend(journal: Path) -> None:
    """Cuts off a line that a kill left without its end: the next one would be written behind it,
    and Optuna reads no further than a line that is no JSON. A kill leaves the whole lines."""
    content = journal.read_bytes() if journal.exists() else b""
    num_whole = content.rfind(b"\n") + 1
    if num_whole != len(content):
        os.truncate(journal, num_whole)


class _HeldBySweep:
    """No lock: the sweep's own keeps others away, and Optuna's outlives a kill by half a minute."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        """Nothing to release."""
