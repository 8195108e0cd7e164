"""Whether the hosts of a run see the same: the folder it writes to, its configuration, its data.

Whatever differs is found at the start and named with its host; a difference found later would be a
run that hangs, or one that trains on other examples than it says.
"""

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdx.config.leaves import flatten, spelled
from sdx.experiment.setup import Setup
from sdx.parallel.agreement import from_first, gather, is_first, process_count
from sdx.record.lock import RefusedStart
from sdx.record.store import AnyPath, StoreError

_SEEN_WITHIN_S = 15.0  # NFS shows a new file of another host late
_LOOK_EVERY_S = 0.2
# May be others on each host: who a process is, and where data lies, which is compared by content.
_OWN = ("distributed.", "data.dir", "data.cache_dir", "run.compilation_cache_dir")
_MOST_NAMED = 4  # hosts or keys in one message

Facts = dict[str, Any]


def check_same_folder(folder: AnyPath, key: str) -> None:
    """Raises RefusedStart, in all processes, where one does not see what the first one writes to
    `folder`, the value of `key`; leaves nothing there."""
    if process_count() == 1:
        return
    with contextlib.ExitStack() as stack:
        name = from_first(lambda: stack.enter_context(_nonce(folder)), (RefusedStart, StoreError))
        blind_for = _blind_for(folder / name)
        seen = gather([blind_for, socket.gethostname(), str(folder.absolute())])
    from_first(lambda: _check_seen(folder, key, seen), (RefusedStart,))


def _check_seen(folder: AnyPath, key: str, seen: Sequence[Sequence[Any]]) -> None:
    writer = f"process 0 on {seen[0][1]} ({seen[0][2]})"
    blind = [
        f"process {i} on {host} ({where}{reason and f': {reason}'})"
        for i, (reason, host, where) in enumerate(seen)
        if reason is not None
    ]
    if blind:
        use = (
            "give a folder on a file system that all of them have mounted, as an absolute path."
            if isinstance(folder, Path)
            else "give all of them the same endpoint, and credentials for it."
        )
        raise RefusedStart(
            f"{key}={folder}: is not one folder for all hosts: what {writer} writes there is not "
            f"seen by {_listed(blind)}; {use}"
        )


@contextlib.contextmanager
def only_first_speaks() -> Iterator[None]:
    """Standard output of the other processes goes nowhere; what goes wrong is said elsewhere."""
    if is_first():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def facts_of(setup: Setup) -> Facts:
    """What must be the same in all processes of a run, by what messages call it."""
    validation = setup.validation
    keys = {
        path: spelled(value)
        for path, value in flatten(setup.config).items()
        if not path.startswith(_OWN)
    }
    return {
        **keys,
        "data": f"{len(setup.source)} examples, fingerprint {setup.source.fingerprint}",
        "eval.split": validation and f"{len(validation)} examples, {validation.fingerprint}",
        "model.pretrained": f"commit {setup.weights.provenance()['commit']}",
        "the steps of the run": setup.max_steps,
    }


def check_same_facts(facts: Facts) -> None:
    """Raises RefusedStart, in all processes, where those of one differ from the first one's."""
    given = gather((socket.gethostname(), facts))
    from_first(lambda: _check_equal(given), (RefusedStart,))


def _check_equal(given: Sequence[tuple[str, Facts]]) -> None:
    faults = [
        fault
        for process, (host, theirs) in enumerate(given)
        for fault in _differences(f"process {process} on {host}", theirs, given[0][1])
    ]
    if faults:
        more = f"\n  and {len(faults) - _MOST_NAMED} more" if len(faults) > _MOST_NAMED else ""
        raise RefusedStart(
            f"the hosts of this run do not agree; the first one is {given[0][0]}:\n"
            + "\n".join(faults[:_MOST_NAMED])
            + more
            + "\nGive all processes the same command and the same files."
        )


def _differences(who: str, theirs: Mapping[str, Any], first: Mapping[str, Any]) -> Iterator[str]:
    for name in first:
        if theirs.get(name) != first[name]:
            yield f"  {who}: {name} is {theirs.get(name)} there, {first[name]} on the first"


@contextlib.contextmanager
def _nonce(folder: AnyPath) -> Iterator[str]:
    """The name of a file in `folder`, which is made if need be; both go in the end."""
    above = (folder, *folder.parents) if isinstance(folder, Path) else ()  # a store needs none
    missing = [path for path in above if not path.exists()]
    path = folder / f".sdx-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    except StoreError:  # says what is wrong
        raise
    except OSError as error:
        raise RefusedStart(
            f"{folder}: cannot be written ({error.strerror}); use another folder."
        ) from error
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()


def _blind_for(path: AnyPath) -> str | None:
    """Why this process does not see `path`, "" where nothing is known; None where it does."""
    until = time.monotonic() + (0 if is_first() else _SEEN_WITHIN_S)
    try:
        while not path.exists():
            if time.monotonic() > until:
                return ""
            with contextlib.suppress(OSError):
                list(path.parent.iterdir())  # makes NFS look again
            time.sleep(_LOOK_EVERY_S)
    except StoreError as error:
        return str(error)
    return None


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more"
