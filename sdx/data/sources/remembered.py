"""What was found out about the user's data, kept in the user's cache between runs.

Losing it costs time and nothing else: what cannot be read is found out anew.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCAN_CACHE = Path("~/.cache/sdx/scans")
INDEX_CACHE = Path("~/.cache/sdx/indexes")


def recall(cache: Path | None, key: str) -> Any:
    """What was remembered under `key`, as JSON gives it back; None where nothing readable is."""
    if cache is None:
        return None
    try:
        return json.loads(_file(cache, key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def remember(cache: Path | None, key: str, content: Any, say: Callable[[str], None]) -> None:
    """Keeps `content`, which JSON can hold, under `key`; a disk that cannot is told of."""
    if cache is None:
        return
    file = _file(cache, key)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, delete=False
        ) as temporary:
            json.dump(content, temporary)
        os.replace(temporary.name, file)
    except OSError as error:
        say(f"what was found out about the data is not remembered: {file}: {error.strerror}")


def _file(cache: Path, key: str) -> Path:
    name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:24]
    return cache.expanduser() / f"{name}.json"
