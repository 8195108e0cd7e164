"""What the processes of one run tell each other: a value of the first one, or one of each.

Values go as JSON through the coordination service of `jax.distributed`, not through the devices:
so they can be of any length, come before anything is compiled, wait for hours while one process
works, and cannot fall in between the collectives of a step. All processes make the same calls in
the same order, from their main thread. What one of them cannot go on for ends all (failures.py), so
that none is waited for in vain. With one process every call is what it is given.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

# The key-value client has no public name; Orbax, Flax and MaxText take it from here too.
from jax._src import distributed

Value = TypeVar("Value")

_PATIENCE_MS = 7 * 24 * 3600 * 1000  # the first process may be uploading a model
_TIDY_EVERY = 256  # so many values of the first process are kept by the service at most
_MARKS = "sdx/marks/"
_numbers = itertools.count()
_told: list[str] = []
"""Keys of this process that the service still keeps."""


def process_index() -> int:
    """The number of this process; asks no device."""
    return distributed.global_state.process_id if _is_shared() else 0


def process_count() -> int:
    """Processes of this run; asks no device."""
    return int(distributed.global_state.num_processes or 1) if _is_shared() else 1


def is_first() -> bool:
    """Whether this is the process that decides, and writes what all share."""
    return process_index() == 0


def gather(value: Value) -> list[Value]:
    """The value that each process gave, which JSON can carry, in the order of the processes."""
    if process_count() == 1:
        return [value]
    read, number = len(_told), next(_numbers)
    _tell(f"{number}/{process_index()}", value)
    found = [_hear(f"{number}/{process}") for process in range(process_count())]
    for key in _told[:read]:  # all processes are past what came before
        _service().key_value_delete(key)
    del _told[:read]
    return found


def from_first(compute: Callable[[], Value], raises: tuple[type[Exception], ...] = ()) -> Value:
    """What `compute` makes in the first process, which JSON can carry, or the error, one of
    `raises`, that it ended with there; the others call nothing. Such an error is made anew of its
    text."""
    if process_count() == 1:
        return compute()
    number = next(_numbers)
    if number % _TIDY_EVERY == 0:
        gather(None)
    if is_first():
        try:
            value = compute()
        except raises as error:
            kind = next(i for i, kind in enumerate(raises) if isinstance(error, kind))
            _tell(f"{number}/0", {"error": str(error), "kind": kind})
            raise
        _tell(f"{number}/0", {"value": value})
        return value
    told = _hear(f"{number}/0")
    if "error" in told:
        error = raises[told["kind"]](told["error"])
        error.is_heard = True  # pyright: ignore[reportAttributeAccessIssue]
        raise error
    return told["value"]


def from_each(compute: Callable[[], Value], raises: tuple[type[Exception], ...] = ()) -> Value:
    """What `compute` makes in this process; in all of them the same error where it ended with one
    of `raises` in any."""
    if process_count() == 1:
        return compute()
    value, fault = None, None
    try:
        value = compute()
    except raises as error:
        kind = next(i for i, kind in enumerate(raises) if isinstance(error, kind))
        fault = {"error": str(error), "kind": kind}
    for told in gather(fault):
        if told is not None:
            raise raises[told["kind"]](told["error"])
    return cast(Value, value)


def leave_to_first(error: Exception) -> None:
    """Returns unless the error was heard of in `from_first`: the first process says it and ends all
    of them, this one with it."""
    if getattr(error, "is_heard", False):
        gather(None)  # which the first one never comes to


def _alone(compute: Callable[[], Value], raises: tuple[type[Exception], ...] = ()) -> Value:
    return compute()


class Readers(NamedTuple):
    """How those who look at the same thing come to one opinion of it: called as `from_first`."""

    first: Callable[..., Any]
    """By what the first of them sees."""
    each: Callable[..., Any]
    """By what each of them sees of its own."""


TOGETHER = Readers(from_first, from_each)
ALONE = Readers(_alone, _alone)
"""Of many processes one looks, and asks nobody."""


def mark(event: str, value: Any = None) -> None:
    """Says once that `event` has come for this process, with a value that JSON can carry; waits for
    nobody. Any thread may call."""
    if process_count() > 1:
        _service().key_value_set(f"{_MARKS}{event}/{process_index()}", json.dumps(value))


def is_marked_by_all(event: str) -> bool:
    """Whether it has come for every process; any of them may ask at any time."""
    return process_count() == 1 or len(_marks(event)) == process_count()


def take_marks(event: str) -> list[Any] | None:
    """The values that came with `event`, in no order; None before it has come for all of the many
    processes. One process takes them once."""
    found = _marks(event)
    if len(found) < process_count():
        return None
    _service().key_value_delete(f"{_MARKS}{event}/")
    return [json.loads(value) for _, value in found]


def _marks(event: str) -> list[tuple[str, str]]:
    return _service().key_value_dir_get(f"{_MARKS}{event}/")


def _is_shared() -> bool:
    return distributed.global_state.client is not None


def _service() -> Any:
    return distributed.global_state.client


def _tell(name: str, value: Any) -> None:
    key = _key(name)
    _service().key_value_set(key, json.dumps(value))
    _told.append(key)


def _hear(name: str) -> Any:
    return json.loads(_service().blocking_key_value_get(_key(name), _PATIENCE_MS))


def _key(name: str) -> str:
    return f"sdx/agreement/{name}"
