"""The TPUs of one launcher: made when a job needs one, used again, vouched for, and deleted.

Each is one queued resource of `num_slices` slices. A thread renews the lease in the labels of those
that are there and deletes those that no job has used for as long as a lease lasts.
"""

import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from sdx.config.launching import TpuSettings
from sdx_launchers import saying
from sdx_launchers.jobs import LaunchError
from sdx_launchers.sweep.stop_signals import unstoppable
from sdx_launchers.tpu.client import NoCapacity, Node, Queued, Tpus, refusal
from sdx_launchers.tpu.ledger import Ledger
from sdx_launchers.tpu.requests import (
    HOLDER,
    OWNER,
    SHAPE,
    Spec,
    creation,
    delete_by_hand,
    labels,
    new_name,
    owner_of,
)
from sdx_launchers.tpu.ssh import Host
from sdx_launchers.tpu.strays import is_in_use, is_kept

_SETTLE_S = 2.0  # two launchers that take the same kept TPU: the later label wins, both see whose
_RENEWALS = 4  # in the time of one lease
_SAY_AGAIN_S = 600.0
DELETING = (
    "sdx: TPUs are given back, which Ctrl-C does not interrupt; after kill -9 they cost money until"
    " python -m sdx.runs --sweep-up"
)


class Cancelled(Exception):
    """Nobody waits for the TPU any more."""


@dataclass
class Tpu:
    """A TPU that is there; `folder` names its record on the launching side."""

    name: str
    node_ids: tuple[str, ...]
    hosts: tuple[Host, ...]
    is_busy: bool = True
    idle_since: float = field(default_factory=time.monotonic)


class Pool:
    """Entered around everything that uses it; all are deleted, or left with `keep`, at its end."""

    def __init__(self, tpus: Tpus, settings: TpuSettings, spec: Spec, sweep: str):
        self._tpus = tpus
        self._settings = settings
        self._spec = spec
        self._sweep = sweep
        self._owner = owner_of(settings)
        self._holder = uuid.uuid4().hex[:16]
        self._lease_s = 60 * settings.lease_min
        self._ledger = Ledger()
        self._there: list[Tpu] = []
        self._coming = 0
        self._changed = threading.Condition()
        self._taking_over = threading.Lock()
        self._is_closed = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="sdx-tpu-lease", daemon=True)

    def __enter__(self) -> "Pool":
        self._ledger.remember(self._tpus.place, self._owner)
        self._keeper.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Nobody may use one any more, or be waiting. Ctrl-C does not interrupt it."""
        with unstoppable(DELETING):
            self._give_up_all()

    def _give_up_all(self) -> None:
        self._is_closed.set()
        self._keeper.join()
        threads = [
            threading.Thread(target=self._leave if self._settings.keep else self._end, args=[tpu])
            for tpu in self._there
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        known = {tpu.name for tpu in self._there}
        for entry in self._ledger.entries():  # what could not be deleted before
            if entry.holder == self._holder and entry.name not in known:
                self._try_to_remove(entry.name)

    def take(self, limit: int, cancelled: threading.Event) -> Tpu:
        """A TPU for one job: one that is free, else another one, of at most `limit` at a time.

        Raises:
            Cancelled: `cancelled` was set; nothing is left behind.
            LaunchError: there is none, and waiting longer will not do.
        """
        with self._changed:
            while True:
                free = next((tpu for tpu in self._there if not tpu.is_busy), None)
                if free is not None:
                    free.is_busy = True
                    return free
                if len(self._there) + self._coming < limit:
                    self._coming += 1
                    break
                if cancelled.is_set():
                    raise Cancelled
                self._changed.wait(self._settings.poll_s)
        try:
            tpu = self._kept() or self._make(cancelled)
            with self._changed:
                self._there.append(tpu)
            return tpu
        finally:
            with self._changed:
                self._coming -= 1
                self._changed.notify_all()

    def give_back(self, tpu: Tpu) -> None:
        """For the next job."""
        with self._changed:
            tpu.is_busy, tpu.idle_since = False, time.monotonic()
            self._changed.notify_all()

    def discard(self, tpu: Tpu) -> None:
        """Deletes one that was lost; LaunchError where that does not succeed."""
        try:
            self._remove(tpu.name)
        finally:
            with self._changed:
                if tpu in self._there:
                    self._there.remove(tpu)
                self._changed.notify_all()

    def lost(self, tpu: Tpu) -> str | None:
        """Why one cannot be used any more; None while it can, and while nobody knows."""
        try:
            for name in tpu.node_ids:
                node = self._tpus.node(name)
                if node is None or node.is_lost:
                    return f"{name} is {'gone' if node is None else node.state}"
            found = self._tpus.queued(tpu.name)
        except LaunchError as error:
            say(str(error))
            return None
        if found is None or found.is_gone:
            return f"{tpu.name} is {'gone' if found is None else found.state}"
        return None

    def _make(self, cancelled: threading.Event) -> Tpu:
        """A TPU that nobody had before; it is deleted again if it does not come in time."""
        deadline = time.monotonic() + 60 * self._settings.startup_timeout_min
        pause = self._settings.poll_s
        while True:
            name = new_name(self._owner)
            self._ledger.note(self._tpus.place, name, self._owner, self._holder)
            try:
                return self._ask(name, deadline, cancelled)
            except NoCapacity as error:
                self._remove(name)
                if time.monotonic() + pause > deadline:
                    raise LaunchError(self._too_late(str(error))) from None
                say(f"{error}; asked again in {pause:.0f} s")
            except BaseException:
                self._remove(name)
                raise
            if cancelled.wait(pause):
                raise Cancelled
            pause = min(2 * pause, 30 * self._settings.poll_s)

    def _ask(self, name: str, deadline: float, cancelled: threading.Event) -> Tpu:
        lasts_s = max(0.0, deadline - time.monotonic()) + self._lease_s
        labelled = self._labels(lasts_s)
        request = creation(self._tpus.place, name, self._spec, labelled, lasts_s)
        operation = self._tpus.create(request)
        said = _Said(name)
        state = "asked for"
        while True:
            found = self._tpus.queued(name)
            if found is None:
                self._tpus.check_created(operation)
            else:
                state = found.state
                said.say(state)
                tpu = self._came(found)
                if tpu is not None:
                    return tpu
            if time.monotonic() > deadline:
                raise LaunchError(self._too_late(f"{name} is {state}"))
            if cancelled.wait(self._settings.poll_s):
                raise Cancelled

    def _came(self, found: Queued) -> Tpu | None:
        """The TPU, once all its slices are ready; raises where it never will be."""
        if found.state == "FAILED":
            raise refusal(self._tpus.place, found.code, found.error)
        if found.is_gone:
            raise NoCapacity(f"{found.name}: {found.state} before it was there")
        if found.state != "ACTIVE":
            return None
        return self._taken([self._tpus.node(name) for name in self._spec.node_ids(found.name)])

    def _taken(self, nodes: list[Node | None]) -> Tpu | None:
        """What `nodes` are together, labelled as ours; None where one is not ready."""
        ready = [
            node for node in nodes if node is not None and node.state == "READY" and node.endpoints
        ]
        if len(ready) < len(nodes):
            return None
        for node in ready:
            self._tpus.relabel(node.name, self._labels(self._lease_s))
        return Tpu(
            ready[0].queued or ready[0].name,
            tuple(node.name for node in ready),
            tuple(
                Host(node.name, number, end.external or end.internal)
                for node in ready
                for number, end in enumerate(node.endpoints)
            ),
        )

    def _kept(self) -> Tpu | None:
        """One that an earlier sweep of this owner kept, of the same kind, and nobody uses."""
        with self._taking_over:
            ours = {tpu.name for tpu in self._there}
            wanted = {OWNER: self._owner, SHAPE: self._spec.shape}
            entries = {entry.name: entry for entry in self._ledger.entries()}
            for found in self._tpus.all_queued():
                if not wanted.items() <= found.labels.items() or found.name in ours:
                    continue
                nodes = [self._tpus.node(name) for name in self._spec.node_ids(found.name)]
                there = [node for node in nodes if node is not None]
                is_free = found.state == "ACTIVE" and is_kept(found, there)
                if not is_free or is_in_use(found, there, entries.get(found.name)):
                    continue
                if (tpu := self._taken(nodes)) is None:
                    continue
                time.sleep(_SETTLE_S)
                if all(self._is_ours(name) for name in tpu.node_ids):
                    self._ledger.note(self._tpus.place, tpu.name, self._owner, self._holder)
                    say(f"{tpu.name}: kept by an earlier sweep, used again")
                    return tpu
        return None

    def _is_ours(self, name: str) -> bool:
        node = self._tpus.node(name)
        return node is not None and node.labels.get(HOLDER) == self._holder

    def _keep(self) -> None:
        """Renews leases, and deletes what is idle."""
        while not self._is_closed.wait(self._lease_s / _RENEWALS):
            with self._changed:
                there = [*self._there]
            for tpu in there:
                if self._is_idle(tpu):
                    self._end(tpu)
                else:
                    self._renew(tpu)

    def _is_idle(self, tpu: Tpu) -> bool:
        """Whether nobody needed it for long; then it is taken out of the pool."""
        with self._changed:
            is_idle = not tpu.is_busy and time.monotonic() - tpu.idle_since > self._lease_s
            if is_idle and not self._settings.keep:
                self._there.remove(tpu)
                return True
            return False

    def _renew(self, tpu: Tpu) -> None:
        try:
            for name in tpu.node_ids:
                self._tpus.relabel(name, self._labels(self._lease_s))
        except LaunchError as error:  # whether it is lost, its job finds out
            say(f"{tpu.name}: its lease was not renewed ({error})")

    def _leave(self, tpu: Tpu) -> None:
        """As it is, free for the next sweep."""
        try:
            for name in tpu.node_ids:
                self._tpus.relabel(name, self._labels(0))
            self._ledger.strike(tpu.name)
            where = delete_by_hand(self._tpus.place, tpu.name)
            say(f"{tpu.name}: kept (keep=true), and costs money; {where}")
        except LaunchError as error:
            say(f"{tpu.name}: {error}")

    def _end(self, tpu: Tpu) -> None:
        self._try_to_remove(tpu.name)

    def _try_to_remove(self, name: str) -> None:
        try:
            self._remove(name)
        except LaunchError as error:
            say(f"{error}\nfix: python -m sdx.runs --sweep-up")

    def _remove(self, name: str) -> None:
        say(f"{name}: is being deleted")
        self._tpus.delete(name, self._spec.node_ids(name))
        self._ledger.strike(name)
        say(f"{name}: deleted")

    def _labels(self, lasts_s: float) -> Mapping[str, str]:
        until = time.time() + lasts_s
        make = partial(labels, self._owner, self._sweep, self._holder, shape=self._spec.shape)
        return make(until=until, keep=self._settings.keep)

    def _too_late(self, last: str) -> str:
        return (
            f"hydra.launcher.startup_timeout_min={self._settings.startup_timeout_min:g}: no "
            f"{self._spec.accelerator_type} came within that time ({last.rstrip('.')}), nothing is "
            "left in the queue; wait longer, use another zone, or another provisioning."
        )


class _Said:
    """Shows the state of what is waited for when it changes, and now and then."""

    def __init__(self, name: str):
        self._name = name
        self._begin = time.monotonic()
        self._last = ("", 0.0)

    def say(self, state: str) -> None:
        waited = time.monotonic() - self._begin
        if state != self._last[0] or waited - self._last[1] > _SAY_AGAIN_S:
            self._last = (state, waited)
            say(f"{self._name}: {state} ({waited / 60:.0f} min)")


def say(text: str) -> None:
    """A line for the person, beside what the jobs say. Nobody may be there to read it any more (a
    terminal that hung up, `2>&1 | tee` after Ctrl-C): TPUs are deleted all the same."""
    saying.say(f"sdx: {text}", aside=True)
