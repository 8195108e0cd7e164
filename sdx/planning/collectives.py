"""Collectives of a compiled program: how often each kind runs in one call, and over how many bytes.

Read from the text of the optimised HLO. An operation that the compiler has split over several
fusions is one chain and counts once; one in a loop counts as often as the loop's bound says,
which is one too many where XLA has peeled the first round off. The TPU compiler writes a
reduce-scatter as an all-reduce with its slice in a fusion named `all-reduce-scatter`; between
slices it sends and receives through the hosts ("megascale").
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "send",
    "recv",
)

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([a-z][a-z-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\]")
_OPERAND = re.compile(r"%([^,\s]+)")
_CHAIN = re.compile(r'\bchannel_id=(\d+).*\bchain_id="(\d+)"')
_CALLED = re.compile(r"\bcalls=%?([^,\s]+)")
_APPLIED = re.compile(r"\bto_apply=%?([^,\s]+)")
_LOOP = re.compile(r"\bcondition=%?([^,\s]+), body=%?([^,\s]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=([^,\s]+))"
)
_CONSTANT = re.compile(r"\b[su]\d+\[\][^=]*\bconstant\((\d+)\)")


@dataclass(frozen=True)
class Collective:
    """One kind of collective in one call of a program, on one device."""

    count: int
    bytes: int
    """Of the whole arrays: what is gathered, reduced, scattered from, exchanged or sent."""


@dataclass(frozen=True)
class _Found:
    kind: str
    bytes: int
    name: str
    """Of the operation; its parts in several fusions have the same. Channels are shared."""


@dataclass
class _Computation:
    found: list[_Found] = field(default_factory=list)
    called: list[str] = field(default_factory=list)
    """Fusions and calls: they run with this computation."""
    loops: list[tuple[str, str]] = field(default_factory=list)
    """Condition and body of each."""
    bound: int = 1
    """Of a condition: the largest integer it compares with."""


def collectives(hlo: str) -> dict[str, Collective]:
    """What one device does in one call, by kind (all_reduce, …); kinds that are absent are left
    out. `hlo` is `Compiled.as_text()`.
    """
    entry, computations = _computations(hlo)
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for found, times in _executed(entry, 1, computations):
        counts[found.kind] = counts.get(found.kind, 0) + times
        sizes[found.kind] = sizes.get(found.kind, 0) + times * found.bytes
    return {
        kind.replace("-", "_"): Collective(counts[kind], sizes[kind])
        for kind in KINDS
        if kind in counts
    }


def _executed(
    name: str, times: int, computations: Mapping[str, _Computation]
) -> Iterator[tuple[_Found, int]]:
    """Each collective that runs when `name` runs `times` times, and how often it does."""
    seen: set[tuple[str, str]] = set()
    for part in _together(name, computations):
        for found in part.found:
            if (found.kind, found.name) not in seen:
                seen.add((found.kind, found.name))
                yield found, times
        for condition, body in part.loops:
            rounds = computations[condition].bound
            yield from _executed(body, times * rounds, computations)


def _together(name: str, computations: Mapping[str, _Computation]) -> Iterator[_Computation]:
    """The computation and all that it fuses and calls, loops apart."""
    computation = computations[name]
    yield computation
    for called in computation.called:
        yield from _together(called, computations)


def _computations(hlo: str) -> tuple[str, dict[str, _Computation]]:
    """The name of the entry, and every computation by its name."""
    entry, name, types = "", "", dict[str, str]()
    computations: dict[str, _Computation] = {}
    for line in hlo.splitlines():
        if not line.startswith(" "):
            if head := _COMPUTATION.match(line):
                name, types = head[2], {}
                computations[name] = _Computation()
                entry = name if head[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            _read(computations[name], name, types, *instruction.groups())
    return entry, computations


def _read(
    computation: _Computation, within: str, types: dict[str, str], name: str, type_: str, *rest: str
) -> None:
    opcode, text = rest
    types[name] = type_
    kind = opcode.removesuffix("-start")
    if kind in KINDS:
        chain = _CHAIN.search(text)
        size = _moved(opcode, type_, text, types)
        if kind == "all-reduce" and within.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        computation.found.append(_Found(kind, size, " ".join(chain.groups()) if chain else name))
    elif opcode == "while":
        loop = _LOOP.search(text)
        assert loop is not None, text
        computation.loops.append((loop[1], loop[2]))
    elif opcode == "constant":
        bound = _CONSTANT.search(f"{type_} constant({text}")
        computation.bound = max(computation.bound, int(bound[1]) if bound else 1)
    elif opcode in {"fusion", "call", "async-start", "conditional"}:
        computation.called += _named(text)


def _named(text: str) -> Iterator[str]:
    """The computations that a fusion, a call or a conditional runs; all branches of the last."""
    for pattern in (_CALLED, _APPLIED):
        if found := pattern.search(text):
            yield found[1]
    for several, one in _BRANCHES.findall(text):
        yield from (part.strip().lstrip("%") for part in (several or one).split(","))


def _moved(opcode: str, type_: str, text: str, types: Mapping[str, str]) -> int:
    """Bytes of the whole array of a collective."""
    sizes = [_size(*array) for array in _ARRAY.findall(type_)]
    if opcode.startswith("reduce-scatter"):
        operands = _OPERAND.findall(text.partition(")")[0])
        return sum(_size(*a) for name in operands for a in _ARRAY.findall(types[name]))
    if opcode in {"send", "recv"}:
        return sizes[0]  # then a context and a token
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        arrays = [size for size in sizes if size > 4]  # without the contexts of a permute
        return sum(arrays[len(arrays) // 2 :])  # operands, then results
    return sum(sizes)


def _size(letters: str, bits: str, dims: str) -> int:
    """Bytes of one array type; of a token none, a `pred` takes a byte."""
    if letters in {"token", "opaque"}:
        return 0
    numbers = math.prod(int(dim) for dim in dims.split(",") if dim)
    return numbers * (int(bits) if bits else 8) // 8
