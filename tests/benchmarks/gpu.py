"""Training images a second and MFU on one GPU, and where the time goes; beside torch diffusers.

    python tests/benchmarks/gpu.py [--batches 32,64,16] [--seconds 540] [--out FILE]

Stable Diffusion 2.1 base at 512 pixels from cached moments: the step that `sdx.train` compiles
(`program.build`, donated state), bfloat16 compute over float32 weights, no EMA. Every batch size on
each side is a process of its own, in turn, so that none shares the GPU or its memory with another,
and one that does not fit, fails or runs out of time is a row of the table. Steps are timed in
windows that the host waits for once; what counts is the median of the windows. Each row is written
to the file as soon as it is known, so that a command that is cut off has left what it found; where
the file has a row already, it is not measured again.

MFU counts forward and backward of the UNet, attention included, against the data sheet's dense
bfloat16 rate. To beat: 135.9 images/s on an H100 (NVIDIA, MLPerf Training 4.1, 33 % MFU).
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))  # sdx need not be installed

from tests.benchmarks.gpu_task import Event, Task  # noqa: E402

ANCHOR, GOAL = 135.9, 165.0
SIDES = ("sdx", "torch")
MEASURED = ("done", "out of memory")
FULL = ("model=sd21_base", "data.resolution=512")
MODELS = {
    "sd21_base": FULL,
    "tiny": (
        "model=tiny",
        "data.resolution=16",
        "model.unet.block_out_channels=[8]",
        "model.unet.down_block_types=[CrossAttnDownBlock2D]",
        "model.unet.attention_head_dim=[2]",
        "model.unet.norm_num_groups=4",
    ),
}
HARDWARE = {"gpu": "gpu_h100_1", "cpu": "cpu"}
SHARES = ("attention", "convolution", "normalisation", "product", "other", "unknown")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 where sdx has a time for a batch size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batches", default="32,64,16", help="batch sizes, in order (32,64,16)")
    parser.add_argument("--rounds", type=int, default=1, help="times everything is measured (1)")
    parser.add_argument("--windows", type=int, default=7, help="timed windows (7)")
    parser.add_argument("--steps", type=int, default=5, help="steps in a window (5)")
    parser.add_argument("--seconds", type=float, default=540, help="for the whole command (540)")
    parser.add_argument("--sides", default="sdx,torch", help="what is measured (sdx,torch)")
    parser.add_argument("--model", choices=MODELS, default="sd21_base")
    parser.add_argument("--platform", choices=HARDWARE, default="gpu")
    parser.add_argument("--hardware", help="preset of conf/hardware (gpu_h100_1, or cpu)")
    parser.add_argument("--set", nargs="*", default=[], help="more of sdx's KEY=VALUE")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "outputs/benchmarks/gpu.jsonl")
    parser.add_argument("--cache", default=str(REPOSITORY / "outputs/benchmarks/compiled"))
    options = parser.parse_args(argv)
    deadline = time.monotonic() + options.seconds
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = _read(options.out)
    absent = set()  # sides of this command: what is missing may be there at the next one
    for wanted in _order(options):
        if any(_is_same(row, wanted) and row["status"] in MEASURED for row in rows):
            continue
        if wanted["side"] in absent:
            continue
        row = wanted | _measure(wanted, options, deadline - time.monotonic())
        rows.append(row)
        if row["status"] == "absent":
            absent.add(row["side"])
        with options.out.open("a") as file:
            print(json.dumps(row), file=file, flush=True)
        print(_line(row), file=sys.stderr, flush=True)
    ours = [row for row in rows if row["overrides"] == _overrides(options, row["batch_size"])]
    print(table(ours))
    return 0 if any(row["side"] == "sdx" and "step_s" in row for row in ours) else 1


def table(rows: Sequence[Event]) -> str:
    """Markdown: a line for each batch size, and below what it was measured with."""
    head = ["batch", "images/s", "ms", "MFU", "with captions", *SHARES, "GiB", "compiled in"]
    lines = [[*head, "torch images/s", "sdx / torch"]]
    for batch in dict.fromkeys(row["batch_size"] for row in rows):
        ours, theirs = (_merged(rows, side, batch) for side in SIDES)
        rate, other = _rate(ours), _rate(theirs)
        shares = ours.get("shares", {})
        lines.append(
            [
                str(batch),
                ours.get("status", "") if rate is None else f"{rate:.1f}",
                _shown(ours.get("step_s"), "{:.1f}", 1e3),
                _shown(_mfu(ours), "{:.1%}"),
                _shown(_rate(ours, "step_with_captions_s"), "{:.1f}"),
                *(_shown(shares.get(part), "{:.1%}") for part in SHARES),
                _shown(ours.get("peak_gib") or ours.get("temp_gib"), "{:.1f}"),
                _shown(ours.get("compile_s"), "{:.0f} s"),
                theirs.get("status", "") if other is None else f"{other:.1f}",
                "" if rate is None or other is None else f"{rate / other:.2f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = [
        "| " + " | ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    return "\n".join([*text, "", *_remarks(rows)])


def _remarks(rows: Sequence[Event]) -> Iterable[str]:
    facts = {
        f"{row['device']}, {row['software']}, flags {row['flags']}": row
        for row in rows
        if "device" in row
    }
    yield from facts
    for row in list(facts.values())[:1]:
        yield f"attention: {row['attention']}"
        peak = f", MFU of {row['peak_tflops']:g} TFLOP/s" if row["peak_tflops"] else ""
        yield f"{row['gflops_per_image']:.1f} GFLOP an image{peak}"
    for row in rows:
        if row["side"] == "torch" and "software" in row:
            yield f"{row['software']}, eager, bfloat16 autocast"
            break
    for row in rows:
        if "detail" in row:
            yield f"{row['side']}, batch {row['batch_size']}: {row['status']}: {row['detail']}"
    best = max((_rate(row) or 0.0 for row in rows if row["side"] == "sdx"), default=0.0)
    if best and any("H100" in row.get("device", "") for row in rows):
        yield f"best {best:.1f} images/s = {best / ANCHOR:.2f} of {ANCHOR}, goal {GOAL:g}"


def _order(options: argparse.Namespace) -> Iterable[Event]:
    """Each batch size on each side in turn; who is first changes with every one."""
    sides = options.sides.split(",")
    batches = [int(batch) for batch in options.batches.split(",")]
    for round_number in range(options.rounds):
        for place, batch in enumerate(batches):
            turned = (round_number + place) % 2 == 1
            for side in reversed(sides) if turned else sides:
                overrides = _overrides(options, batch)
                yield {
                    "side": side, "batch_size": batch, "round": round_number,
                    "overrides": overrides,
                }  # fmt: skip


def _overrides(options: argparse.Namespace, batch: int) -> list[str]:
    hardware = options.hardware or HARDWARE[options.platform]
    return [
        *MODELS[options.model],
        f"hardware={hardware}",
        "hardware.num_devices=1",
        "model.init=random",
        "data.cache=moments",
        "train.ema=false",
        "train.per_device_batch_size=null",
        f"train.global_batch_size={batch}",
        *options.set,
    ]


def _measure(wanted: Event, options: argparse.Namespace, seconds: float) -> Event:
    """What the process of a row says in its time, in one; `status` says how it ended."""
    if seconds < 1:
        return {"status": "no time"}
    task = Task(
        overrides=wanted["overrides"],
        batch_size=wanted["batch_size"],
        windows=options.windows,
        steps=options.steps,
        cache=options.cache,
        shares=wanted["round"] == 0,
        captions=wanted["round"] == 0,
    )
    command = [sys.executable, "-m", f"tests.benchmarks.gpu_{wanted['side']}", task.to_json()]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        path for path in (str(REPOSITORY), os.environ.get("PYTHONPATH")) if path
    )
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as noise:
        process = subprocess.Popen(
            command, stdout=said, stderr=noise, env=environment, cwd=REPOSITORY,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(seconds)
            status: Event = {"status": "failed"}
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = {"status": "out of time"}
        said.seek(0)
        noise.seek(0)
        events = [json.loads(line) for line in said if line.startswith("{")]
        found = {key: value for event in events for key, value in event.items()}
        if "status" not in found and status["status"] == "failed":
            last = [line.strip() for line in noise if line.strip()][-3:]
            status["detail"] = f"ended with {process.returncode}: {' / '.join(last)[-300:]}"
    return status | found


def _read(file: Path) -> list[Event]:
    """Rows of an earlier command; a torn last line is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _is_same(row: Event, wanted: Event) -> bool:
    return all(row[name] == wanted[name] for name in ("side", "round", "overrides"))


def _merged(rows: Sequence[Event], side: str, batch: int) -> Event:
    """All rows of one side and batch size as one, with the median of their times."""
    found = [row for row in rows if (row["side"], row["batch_size"]) == (side, batch)]
    merged: Event = {}
    for row in sorted(found, key=lambda row: "step_s" in row):
        merged |= row
    times = [row["step_s"] for row in found if "step_s" in row]
    return merged | ({"step_s": statistics.median(times)} if times else {})


def _rate(row: Event, name: str = "step_s") -> float | None:
    return row["batch_size"] / row[name] if row.get(name) else None


def _mfu(row: Event) -> float | None:
    rate, peak = _rate(row), row.get("peak_tflops")
    return None if rate is None or peak is None else rate * row["gflops_per_image"] / 1e3 / peak


def _shown(number: Any, text: str, factor: float = 1.0) -> str:
    return "" if number is None else text.format(number * factor)


def _line(row: Event) -> str:
    rate = _rate(row)
    what = row["status"] if rate is None else f"{rate:.1f} images/s ({row['status']})"
    return f"{row['side']}, batch {row['batch_size']}, round {row['round']}: {what}"


if __name__ == "__main__":
    sys.exit(main())
