"""What goes wrong in the processes of a run, in a source tree of the tests: `source_tree.py` puts
this file into `sdx/training` there.

Variables say what. The first start of a job waits with SDX_TEST_HOLD=STEP before that step until a
file `go` lies beside its job.json, and then takes its time, so that what it was asked meanwhile is
heard before the last step. It takes S seconds more for each step from the fourth on with
SDX_TEST_SLOW=S. With SDX_TEST_RAISE=RANK:STEP that rank raises there, at every start.

Compiled programs are kept by all processes, not by the first alone: on a CPU each has its own.
"""

import os
import time
from pathlib import Path
from typing import Any

from jax._src import compilation_cache, compiler

from sdx.data.loader import HostBatch
from sdx.parallel.agreement import process_index
from sdx.training.program import Batch, Program

_AFTERWARDS_S = 2.0
_place_batch = Program.place_batch


def _place(self: Program, host: HostBatch) -> Batch:
    if "SLURM_RESTART_COUNT" not in os.environ:
        _linger(host.step)
    rank, _, step = os.environ.get("SDX_TEST_RAISE", ":").partition(":")
    if rank and (process_index(), host.step) == (int(rank), int(step)):
        raise ArithmeticError(f"a fault planted in rank {rank}")
    return _place_batch(self, host)


def _linger(step: int) -> None:
    if step > 3:
        time.sleep(float(os.environ.get("SDX_TEST_SLOW", 0)))
    go = Path(os.environ.get("SDX_JOB", "job.json")).with_name("go")
    hold = int(os.environ.get("SDX_TEST_HOLD", 0))
    while 0 < hold == step and not go.exists():
        time.sleep(0.1)
    if 0 < hold < step:
        time.sleep(_AFTERWARDS_S)


# what comes last, the host callbacks, JAX 0.12 does not hand over any more
def _keep(key: str, seconds: float, name: str, backend: Any, program: Any, *_: Any) -> None:
    compilation_cache.put_executable_and_time(key, name, program, backend, int(seconds))


Program.place_batch = _place
compiler._cache_write = _keep
