"""Names of TPUs that this user's launchers asked for, written down before they are asked for.

What is on the ledger may cost money, and which process vouches for it is known to the machine it
runs on: one that was killed is found out at its next start, without waiting for a lease.

    $XDG_STATE_HOME/sdx/tpu/ (~/.local/state/sdx/tpu/)   <name>.json, places/<hash>.json
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdx.record.files import DamagedRecord, now, read_json, write_json
from sdx.record.owner import Owner, lives_here, this_process
from sdx_launchers.saying import say
from sdx_launchers.tpu.requests import Place


@dataclass(frozen=True)
class Entry:
    """A queued resource that was asked for, or was about to be; `holder` is the launcher's label,
    `process` the launcher."""

    place: Place
    name: str
    owner: str
    holder: str
    process: Owner
    noted: str

    @property
    def is_vouched_for(self) -> bool | None:
        """Whether its launcher lives; None where only another machine knows."""
        return lives_here(self.process)


class Ledger:
    """All entries of this user, of any launcher."""

    def __init__(self, folder: Path | None = None):
        self._folder = folder or _state_folder()

    def note(self, place: Place, name: str, owner: str, holder: str) -> None:
        """Writes down that this process is about to make, or to take over, `name`."""
        entry = Entry(place, name, owner, holder, this_process(), now())
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(self._folder / f"{name}.json", asdict(entry))

    def strike(self, name: str) -> None:
        """Takes `name` off, which is known to be gone."""
        (self._folder / f"{name}.json").unlink(missing_ok=True)

    def entries(self) -> list[Entry]:
        """Everything that may still be there."""
        return [_entry(fields) for fields in _read(self._folder)]

    def remember(self, place: Place, owner: str) -> None:
        """Notes that TPUs of `owner` are asked for at `place`: strays are looked for there."""
        folder = self._folder / "places"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = hashlib.sha256(repr((place, owner)).encode()).hexdigest()[:16]
        write_json(folder / f"{key}.json", {"place": asdict(place), "owner": owner})

    def places(self) -> list[tuple[Place, str]]:
        """Wherever TPUs were asked for, and as whose."""
        noted = [
            (Place(**fields["place"]), str(fields["owner"]))
            for fields in _read(self._folder / "places")
        ]
        listed = [(entry.place, entry.owner) for entry in self.entries()]
        return list(dict.fromkeys([*noted, *listed]))


def _state_folder() -> Path:
    root = os.environ.get("XDG_STATE_HOME")
    return (Path(root) if root else Path.home() / ".local" / "state") / "sdx" / "tpu"


def _read(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        try:
            fields = read_json(path)
        except DamagedRecord as error:
            say(f"sdx: {error}")
            continue
        if fields is not None:
            yield fields


def _entry(fields: dict[str, Any]) -> Entry:
    place, process = Place(**fields["place"]), Owner(**fields["process"])
    return Entry(**{**fields, "place": place, "process": process})
