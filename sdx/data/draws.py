"""Random choices on the host as pure functions: the order of an epoch, and draws for one example.

Everything is derived from BLAKE2b of the arguments, so no state is kept or saved, any position can
be asked for first, and the values do not depend on the version of NumPy, the number of hosts or the
order of the calls.
"""

import hashlib
import math
import struct

# 4 rounds make a pseudo-random permutation (Luby & Rackoff 1988); the domains here can be tiny.
_NUM_ROUNDS = 8


def shuffled(position: int, length: int, *, seed: int, epoch: int, stream: str = "order") -> int:
    """The index at `position` of this epoch's order: a bijection of range(length).

    A Feistel network over a rectangle of about sqrt(length) × sqrt(length) cells; values past the
    end walk on through the permutation until they fall inside (Black & Rogaway 2002, "Ciphers with
    arbitrary finite domains").
    """
    if not 0 <= position < length:
        raise IndexError(f"position {position} is not in range({length})")
    num_rows = math.isqrt(length - 1) + 1
    num_columns = -(-length // num_rows)
    cell = position
    while True:
        row, column = divmod(cell, num_columns)
        for round_ in range(0, _NUM_ROUNDS, 2):
            row = (row + _hash(stream, seed, epoch, round_, column)) % num_rows
            column = (column + _hash(stream, seed, epoch, round_ + 1, row)) % num_columns
        cell = row * num_columns + column
        if cell < length:
            return cell


def uniform(stream: str, *, seed: int, epoch: int, index: int) -> float:
    """A number in [0, 1) for this use (`stream`) of this example in this epoch."""
    return (_hash(stream, seed, epoch, index) >> 11) * 2.0**-53


def randint(stream: str, stop: int, *, seed: int, epoch: int, index: int) -> int:
    """A number in range(stop) for this use of this example in this epoch."""
    return _hash(stream, seed, epoch, index) % stop  # bias below stop / 2**64


def _hash(stream: str, *numbers: int) -> int:
    data = struct.pack(f"<{len(numbers)}Q", *numbers)
    # `person` separates the streams; it holds 16 bytes
    digest = hashlib.blake2b(data, digest_size=8, person=stream.encode()).digest()
    return int.from_bytes(digest, "little")
