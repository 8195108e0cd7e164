"""Loader processes: Grain runs them and moves their batches through shared memory; here is how they
end, and what is said when one dies or hangs.

Each process writes the stacks of its threads to a file of its own when it is asked to by a signal,
and when it crashes, so that what it was doing can be said even where it is stuck inside C code.

Grain is imported when processes are made: its import takes over a second.
"""

import faulthandler
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from sdx.data.source import DataError

_NUM_THREADS = 2  # of each process
_STACK_SIGNAL = signal.SIGUSR1
_STACK_WAIT_S = 3.0
_CLOSE_S = 5.0  # for one batch to be read to its end
_DIED = re.compile(r"Worker process was terminated unexpectedly with exit code (-?\d+)")


class Workers:
    """`read`, done by `num_workers` processes for the steps from the first on."""

    def __init__(self, read: Callable[[int], dict[str, Any]], first_step: int, num_workers: int):
        self._folder = Path(tempfile.mkdtemp(prefix="sdx-loader-"))
        self._batches = _grain_iterator(read, first_step, num_workers, self._folder)

    def read(self, step: int) -> dict[str, Any]:
        """`read(step)`, of one step after the other; raises what the process raised, or DataError
        if it died.
        """
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if (died := _DIED.match(str(error))) is None:
                raise
            raise DataError(_obituary(int(died[1]), self._written())) from None
        assert batch["step"] == step, "steps are asked for in order"
        return batch

    def stacks(self) -> str:
        """Where the processes stand in reading, by process."""
        files = sorted(self._folder.iterdir())
        asked = [file for file in files if _send(int(file.name), _STACK_SIGNAL)]
        until = time.monotonic() + _STACK_WAIT_S
        while any(file.stat().st_size == 0 for file in asked) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.05)  # to the end of what is being written
        told = [f"process {file.name}{_condition(file)}\n" for file in files]
        return "".join(told) or "  no process has begun\n"

    def kill(self) -> None:
        """Ends the processes whatever they are at; one that is only starting finds no folder."""
        pids = [int(file.name) for file in self._folder.iterdir()]
        shutil.rmtree(self._folder, ignore_errors=True)
        for pid in pids:
            _send(pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends the processes: when they have read what they are at, or else after a while."""
        # Grain waits without limit for a process that hangs.
        closing = threading.Thread(target=self._batches.close, name="sdx-closing", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)
        if self._folder.is_dir():
            self.kill()
        closing.join(_CLOSE_S)

    def _written(self) -> str:
        return "".join(
            _reading(file.read_text(errors="replace")) for file in self._folder.iterdir()
        )


def _grain_iterator(
    read: Callable[[int], dict[str, Any]], first_step: int, num_workers: int, folder: Path
) -> Any:
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain reads a flag here, and nothing in sdx parses them
        flags.FLAGS.mark_as_parsed()
    batches = (
        grain.MapDataset.range(first_step, sys.maxsize)
        .map(read)
        .to_iter_dataset(
            grain.ReadOptions(num_threads=_NUM_THREADS, prefetch_buffer_size=_NUM_THREADS)
        )
    )
    options = grain.MultiprocessingOptions(num_workers=num_workers)
    return iter(batches.mp_prefetch(options, worker_init_fn=partial(_begin, folder)))


def _begin(folder: Path, worker_index: int, num_workers: int) -> None:
    """Makes a loader process end when the trainer does, however that ends, and never by Ctrl-C, and
    tell its stacks when asked.

    Without it, workers of a trainer killed with -9 wait for ever on a full queue; and an interrupt
    from the terminal, which reaches the whole group, would end the workers before the trainer has
    saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None, "runs in a spawned process"

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, name="end with parent", daemon=True).start()
    stacks = (folder / str(os.getpid())).open("w")
    faulthandler.enable(stacks)
    faulthandler.register(_STACK_SIGNAL, stacks)


def _obituary(exit_code: int, stacks: str) -> str:
    """What is said of a loader process that died."""
    cause = "what it wrote is above"
    if exit_code < 0:
        cause = f"signal {signal.Signals(-exit_code).name}"
    if exit_code == -signal.SIGKILL:
        cause += ", which the kernel sends where memory runs out: use fewer data.num_workers"
    return (
        f"data.num_workers: a loader process died with exit code {exit_code} ({cause}). Start again"
        f" and the run goes on from its last checkpoint; data.num_workers=0 reads in this process."
        + (f" It stood at\n{stacks}" if stacks else "")
    )


def _send(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _condition(file: Path) -> str:
    """` stands at`, and the stacks it wrote; or why there are none."""
    written = file.read_text(errors="replace")
    if written:
        return f" stands at\n{_reading(written)}" if _reading(written) else " waits for work"
    try:
        status = Path("/proc", file.name, "status").read_text()
    except OSError:
        return " has ended" if not _send(int(file.name), 0) else " does not answer"
    return f" does not answer; it is {status.partition('State:')[2].splitlines()[0].strip()}"


def _reading(stacks: str) -> str:
    """Of faulthandler's stacks those of threads that read, innermost call first, down to Grain."""
    blocks = re.split(r"^(?:Current thread|Thread) 0x.*\n", stacks, flags=re.MULTILINE)
    reading = [block for block in blocks if "/grain/" in block and "in _getitem" in block]
    lines = (line for block in reading for line in block.partition("/grain/")[0].splitlines()[:-1])
    return "".join(f"{line}\n" for line in lines)
