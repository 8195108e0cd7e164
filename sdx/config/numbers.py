"""Numbers on the command line of `sample` and `evaluate`, as types of argparse."""

from argparse import ArgumentTypeError

from sdx.config.schema import MAX_SEED


def whole(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """A seed that JAX takes whole."""
    if not text.isdecimal() or int(text) > MAX_SEED:
        raise ArgumentTypeError(f"{text}: must be a whole number from 0 to {MAX_SEED}")
    return int(text)


def scale(text: str) -> float:
    """A guidance scale: a finite number of at least 1."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number < float("inf"):
        raise ArgumentTypeError(f"{text}: must be a number of at least 1")
    return number
