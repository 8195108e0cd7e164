"""What a compiled program's time goes to: the operations in a profiler's trace, by part of the
network.

Layers name their operations after the part they are (`jax.named_scope` in sdx/models), and XLA
keeps that name through differentiation and fusion. A fusion is of the part that its convolution or
product is of, else of the one most of its operations are of. Kernels that the trace gives no
operation for, as those inside CUDA graphs, go by their names.

Read is the trace's JSON: `jax.profiler.ProfileData` ends the process over some events (jax 0.12).
"""

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("attention", "convolution", "normalisation", "product")
OTHER, UNKNOWN = "other", "unknown"
CONTAINERS = ("call", "while", "conditional", "async-start", "async-done")
_PART = re.compile(rf"\b({'|'.join(PARTS)})\b")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (?:\([^=]*\)|\S+) ([\w\-]+)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_KERNELS = (
    (re.compile(r"fmha|flash|sdpa|attention", re.I), "attention"),
    (re.compile(r"conv|fprop|dgrad|wgrad|implicit_gemm", re.I), "convolution"),
    (re.compile(r"gemm|gemv|cutlass|nvjet|matmul", re.I), "product"),
    (re.compile(r"memcpy|memset", re.I), OTHER),
)


@dataclass(frozen=True)
class Instruction:
    """A line of a compiled program."""

    name: str
    opcode: str
    part: str | None
    called: tuple[str, ...]


def parts_of(text: str) -> dict[str, str]:
    """The part that each instruction of the program in `text` is of, by name; containers, whose
    time is that of what they hold, are left out."""
    computations = {name: [*found] for name, found in _computations(text)}
    return {
        one.name: _part(one, computations)
        for found in computations.values()
        for one in found
        if one.opcode not in CONTAINERS
    }


def seconds_by_part(trace: Path, parts: Mapping[str, str]) -> dict[str, float]:
    """Device seconds of each part in the newest trace under `trace`."""
    newest = max(trace.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    events = json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"]
    kernels = {re.sub(r"\W", "_", name): part for name, part in parts.items()}
    seconds: dict[str, float] = defaultdict(float)
    for name, operation, duration_us in _on_device(events):
        part = parts.get(operation or "") or kernels.get(re.sub(r"\W", "_", name))
        if part is None and operation is not None and name == operation:
            continue  # a container
        seconds[part or _of_kernel(name)] += duration_us / 1e6
    return dict(seconds)


def _on_device(events: list[Any]) -> Iterator[tuple[str, str | None, float]]:
    """Name, operation of the program and microseconds of what ran on the device: of a GPU whatever
    its streams did, of a CPU what names an operation."""
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event.get("name") == "thread_name"
    }
    streams = {place for place, name in threads.items() if name.startswith("Stream")}
    for event in events:
        if event.get("ph") != "X" or (streams and (event["pid"], event["tid"]) not in streams):
            continue  # of a GPU's other rows, the same again, summed up
        operation = event.get("args", {}).get("hlo_op")
        if streams or operation is not None:
            yield event["name"], operation, event.get("dur", 0.0)


def _computations(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    name, found = "", []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            name, found = start[1], []
        elif line.startswith("}"):
            yield name, found
        elif made := _INSTRUCTION.match(line):
            op_name = _OP_NAME.search(line)
            marks = _PART.findall(op_name[1]) if op_name else []
            called = tuple(_CALLED.findall(line))
            found.append(Instruction(made[1], made[2], marks[-1] if marks else None, called))


def _part(one: Instruction, computations: Mapping[str, list[Instruction]]) -> str:
    inside = [other for name in one.called for other in computations.get(name, [])]
    heavy = [x.part for x in inside if x.opcode in ("convolution", "dot", "custom-call") and x.part]
    named = Counter(x.part for x in inside if x.part)
    if heavy:
        return heavy[0]
    return named.most_common(1)[0][0] if named else one.part or OTHER


def _of_kernel(name: str) -> str:
    return next((part for pattern, part in _KERNELS if pattern.search(name)), UNKNOWN)
