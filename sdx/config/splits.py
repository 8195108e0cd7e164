"""Names of splits with a slice behind them, as in the `datasets` library: `train[:95%]`.

Owns what such a text means; whether a split of that name exists only the data knows.
"""

import os
import re
from dataclasses import dataclass

_SLICE = re.compile(r"(?P<name>[^\[\]]*)\[(?P<start>[^\[\]:]*):(?P<stop>[^\[\]:]*)\]")
_BOUND = re.compile(r"(?P<number>-?\d[\d_]*)(?P<percent>%?)")


@dataclass(frozen=True)
class Split:
    """A split's name, and which of its examples: from `start` on, before `stop`."""

    name: str
    start: int | None = None
    stop: int | None = None
    in_percent: bool = False

    def rows(self, length: int) -> range:
        """Which of `length` examples, after datasets' arrow_reader: percentages to the closest
        example, negative bounds from the end.
        """
        start = 0 if self.start is None else self._position(self.start, length)
        stop = length if self.stop is None else self._position(self.stop, length)
        return range(start, max(start, stop))

    def _position(self, bound: int, length: int) -> int:
        position = round(bound * length / 100) if self.in_percent else bound
        return min(max(position + length, 0) if position < 0 else position, length)


def parse_split(text: str) -> Split:
    """The split that `text` names, `NAME` or `NAME[START:STOP]`; ValueError says what is wrong."""
    match = _SLICE.fullmatch(text)
    if match is None and ("[" in text or "]" in text):
        raise ValueError("a slice must be NAME[START:STOP], such as train[:95%] or train[1000:]")
    name = text if match is None else match["name"]
    if name in {"", ".", ".."} or os.path.basename(name) != name:
        raise ValueError("must be the name of a split, not a path")
    if match is None:
        return Split(name)
    bounds = {end: _BOUND.fullmatch(match[end]) for end in ("start", "stop") if match[end]}
    given = [bound for bound in bounds.values() if bound is not None]
    if len(given) < len(bounds):
        raise ValueError("its bounds must be whole numbers or whole percentages")
    if len({bound["percent"] for bound in given}) > 1:
        raise ValueError("its bounds must be both numbers or both percentages")
    numbers = {end: int(bound["number"]) for end, bound in bounds.items() if bound is not None}
    in_percent = any(bound["percent"] for bound in given)
    if in_percent and any(abs(number) > 100 for number in numbers.values()):
        raise ValueError("its percentages must be between -100 and 100")
    return Split(name, numbers.get("start"), numbers.get("stop"), in_percent)
