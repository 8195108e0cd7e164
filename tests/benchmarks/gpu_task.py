"""What gpu.py and its processes tell each other: a task as an argument, events on stdout."""

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

Event = dict[str, Any]
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory")


@dataclass(frozen=True)
class Task:
    """One batch size on one side."""

    overrides: list[str]
    batch_size: int
    windows: int
    steps: int
    """In a window, which is what is timed."""
    cache: str
    """Folder of compiled programs."""
    shares: bool = False
    captions: bool = False
    """Time the step with the text encoder before it, too."""
    seed: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def answer_events(events: Callable[[Task], Iterator[Event]]) -> None:
    """Prints the events of the task in the arguments, and what ended them."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print

    def say(event: Event) -> None:
        print(json.dumps(event), file=answers, flush=True)

    status = "done"
    try:
        for event in events(Task(**json.loads(sys.argv[1]))):
            status = event.get("status", status)
            say(event)
        say({"status": status})
    except Exception as error:  # a row of the table, whatever it is
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        fits = not any(sign in text for sign in OUT_OF_MEMORY)
        detail = " ".join(text.split())[:300]
        say({"status": "failed" if fits else "out of memory", "detail": detail})
