"""What goes wrong in the processes of a run, in a source tree of the tests: `source_tree.py` puts
this file into `sdx/training` there.

Variables say what. SDX_TEST_SLOW=S: from the fourth step on each takes S seconds more, in the first
start of a job only. SDX_TEST_RAISE=RANK:STEP: that rank raises there, at every start.

Compiled programs are kept by all processes, not by the first alone: on a CPU each has its own.
"""

import os
import time
from typing import Any

from jax._src import compilation_cache, compiler

from sdx.data.loader import HostBatch
from sdx.parallel.agreement import process_index
from sdx.training.program import Batch, Program

_place_batch = Program.place_batch


def _place(self: Program, host: HostBatch) -> Batch:
    if "SDX_TEST_SLOW" in os.environ and "SLURM_RESTART_COUNT" not in os.environ and host.step > 3:
        time.sleep(float(os.environ["SDX_TEST_SLOW"]))
    rank, _, step = os.environ.get("SDX_TEST_RAISE", ":").partition(":")
    if rank and (process_index(), host.step) == (int(rank), int(step)):
        raise ArithmeticError(f"a fault planted in rank {rank}")
    return _place_batch(self, host)


def _keep(key: str, seconds: float, name: str, backend: Any, program: Any, callbacks: Any) -> None:
    compilation_cache.put_executable_and_time(key, name, program, backend, int(seconds))


Program.place_batch = _place
compiler._cache_write = _keep
