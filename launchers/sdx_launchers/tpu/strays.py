"""TPUs that nobody vouches for any more: found by label and by ledger, and deleted.

One is touched only if it bears its owner's label and its lease is over: that of the label, or, for
a launcher of this machine, the life of its process. A TPU that waits in the queue costs nothing and
cannot be labelled anew (labels are its nodes'); its first lease covers the wait.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sdx.config.launching import TpuSettings
from sdx_launchers.jobs import LaunchError
from sdx_launchers.tpu.client import Node, Queued, Tpus
from sdx_launchers.tpu.ledger import Entry, Ledger
from sdx_launchers.tpu.requests import (
    HOLDER,
    KEEP,
    OWNER,
    Place,
    delete_by_hand,
    lease_end,
    owner_of,
    place_of,
)

Connect = Callable[[Place], Tpus]


@dataclass
class SweptUp:
    """What a search for strays found: names, and for faults what to do."""

    deleted: list[str] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            *(f"{name}: deleted, nobody vouched for it" for name in self.deleted),
            *(f"{name}: left alone, it is in use" for name in self.in_use),
            *(f"{name}: left alone, it was made with keep=true" for name in self.kept),
            *self.faults,
        ]
        return "\n".join(lines) or "No TPU of yours was found."


def sweep_up(
    settings: TpuSettings, *, kept: bool = True, connect: Connect | None = None
) -> SweptUp:
    """Deletes the owner's strays wherever this user asked for TPUs, and where `settings` do.

    Without an owner in `settings` it deletes those of every owner that this user ever named.

    TPUs that a sweep with keep=true left, and that nobody uses, go with `kept`.
    """
    ledger, report = Ledger(), SweptUp()
    connect = connect or (lambda place: Tpus(place, settings.poll_s))
    for place, owner in _searched(settings, ledger, report):
        try:
            _sweep_up_at(connect(place), ledger, owner, report, with_kept=kept)
        except LaunchError as error:
            report.faults.append(str(error))
    return report


def _searched(settings: TpuSettings, ledger: Ledger, report: SweptUp) -> list[tuple[Place, str]]:
    """Where to look for strays, and for whose."""
    noted = ledger.places()
    places = [place for place, _ in noted]
    try:
        if settings.zone is not None:
            places.append(place_of(settings))
    except LaunchError as error:
        report.faults.append(str(error))
    others = noted if settings.owner is None else []
    return list(dict.fromkeys([*((place, owner_of(settings)) for place in places), *others]))


def _sweep_up_at(
    tpus: Tpus, ledger: Ledger, owner: str, report: SweptUp, *, with_kept: bool
) -> None:
    entries = {entry.name: entry for entry in ledger.entries() if entry.place == tpus.place}
    nodes: dict[str, list[Node]] = {}
    for node in tpus.nodes():
        nodes.setdefault(node.queued, []).append(node)
    mine = [found for found in tpus.all_queued() if found.labels.get(OWNER) == owner]
    for found in mine:
        slices = nodes.get(found.name, [])
        if is_in_use(found, slices, entries.get(found.name)):
            report.in_use.append(found.name)
        elif not with_kept and is_kept(found, slices) and not found.is_gone:
            report.kept.append(found.name)
        else:
            _delete(tpus, ledger, found.name, [node.name for node in slices], report)
    for name in set(entries) - {found.name for found in mine}:
        if entries[name].is_vouched_for is False and entries[name].owner == owner:
            _delete(tpus, ledger, name, [], report)


def is_in_use(found: Queued, slices: Sequence[Node], entry: Entry | None) -> bool:
    """Whether a living launcher vouches for it."""
    current = _labels(found, slices)
    if entry is not None and {entry.holder} == {labels.get(HOLDER) for labels in current}:
        vouched_for = entry.is_vouched_for
        if vouched_for is not None:
            return vouched_for
    return max(map(lease_end, current)) > time.time()


def is_kept(found: Queued, slices: Sequence[Node]) -> bool:
    """Whether it was left for later sweeps, or is to be."""
    return all(labels.get(KEEP) == "yes" for labels in _labels(found, slices))


def _labels(found: Queued, slices: Sequence[Node]) -> list[Mapping[str, str]]:
    """Those its slices bear, before it has any those they will begin with."""
    return [node.labels for node in slices] or [found.labels]


def _delete(tpus: Tpus, ledger: Ledger, name: str, nodes: list[str], report: SweptUp) -> None:
    was_there = bool(nodes) or tpus.queued(name) is not None
    try:
        tpus.delete(name, nodes)
    except LaunchError as error:
        report.faults.append(f"{error} By hand: {delete_by_hand(tpus.place, name)}")
        return
    ledger.strike(name)
    if was_there:
        report.deleted.append(name)
