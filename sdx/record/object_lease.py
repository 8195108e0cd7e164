"""The lock of a run folder in an object store, where nothing is locked and little is atomic.

Who creates the object `lock/<n>.json`, one number above those that are there, owns the folder: of
many that try one succeeds, since the store creates an object only where there is none. Each then
looks at the others once more, because a number is free again after its owner left. A dead owner's
object is removed by the next one; its last put is the heartbeat.

A store that ignores the condition (it came to S3 in 2024) lets two that start in the same moment
overwrite each other; both read their object back, so that only the last one goes on, but what
happens between the two reads cannot be excluded.
"""

import json
import time
import uuid
from dataclasses import asdict

from sdx.record.owner import LEASE_S, Owner, RunLocked, lives_here, read_owner, refusal
from sdx.record.store import ObjectPath, StoreError

_TRIES = 5


class ObjectLease:
    """Ours once `claim` returned; `path` is the lock's name in a file system."""

    def __init__(self, path: ObjectPath, owner: Owner):
        self._folder = _folder(path)
        self._owner = owner
        self._mine: ObjectPath | None = None

    def claim(self) -> None:
        """Raises RunLocked where another living process has it."""
        for _ in range(_TRIES):
            there = _locks(self._folder)
            self._refuse(there)
            number = int(there[-1].stem) + 1 if there else 1
            mine = self._folder / f"{number:06d}.json"
            try:
                mine.create(self._record())
            except FileExistsError:  # someone was quicker; or our own put, that was sent twice
                if read_owner(mine) != self._owner:
                    continue
            others = [lock for lock in _locks(self._folder) if lock != mine]
            try:
                self._refuse([*others, mine])
            except RunLocked:
                if read_owner(mine) == self._owner:
                    mine.unlink(missing_ok=True)
                raise
            for dead in others:
                dead.unlink(missing_ok=True)
            self._mine = mine
            return
        raise RunLocked(f"{self._folder.parent}: others take it again and again; try later.")

    def renew(self) -> bool:
        """Notes a sign of life; False where the lock is another's by now."""
        assert self._mine is not None
        there = _locks(self._folder)
        if self._mine not in there or there[-1] != self._mine:
            self.free()
            return False
        self._mine.write_bytes(self._record())
        return True

    def free(self) -> None:
        """Removes our object, if it is ours."""
        if self._mine is not None and read_owner(self._mine) == self._owner:
            self._mine.unlink(missing_ok=True)

    def _refuse(self, locks: list[ObjectPath]) -> None:
        for lock in locks:
            holder = read_owner(lock)
            if holder not in (None, self._owner) and _is_alive(holder, lock):
                raise RunLocked(refusal(self._folder.parent, holder, _silence_s(lock)))

    def _record(self) -> bytes:
        return json.dumps(asdict(self._owner), indent=2).encode()


def is_held(path: ObjectPath) -> bool:
    """Whether a living process holds the lock called `path`."""
    owners = ((read_owner(lock), lock) for lock in _locks(_folder(path)))
    return any(holder is not None and _is_alive(holder, lock) for holder, lock in owners)


def _folder(path: ObjectPath) -> ObjectPath:
    return path.with_suffix("")


def _locks(folder: ObjectPath) -> list[ObjectPath]:
    """By number."""
    return [lock for lock in folder.glob("*.json") if lock.stem.isdecimal()]


def _is_alive(holder: Owner, lock: ObjectPath) -> bool:
    here = lives_here(holder)
    return (_silence_s(lock) or 0.0) <= LEASE_S if here is None else here


def _silence_s(lock: ObjectPath) -> float | None:
    """Seconds since the last heartbeat, both ends by the store's clock; None where it just went."""
    probe = lock.with_name(f"{uuid.uuid4().hex}.now")
    try:
        probe.write_bytes(b"")
        there = probe.modified()
        probe.unlink()
    except StoreError:  # a store we may only read
        there = time.time()
    try:
        return there - lock.modified()
    except FileNotFoundError:
        return None
