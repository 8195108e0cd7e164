"""`sdx.train`, noting which examples each batch put on the devices of this process.

    python -m tests.experiment.recorded FILE OVERRIDE ...

`{process}` in FILE is the number of the process. Arrays of this model are small; they are sharded
all the same, so that a process has only a part of the state. With SLOW in the environment later
steps take half a second, for who wants to interrupt them.
"""

import json
import os
import sys
import time

import numpy as np

from sdx import train
from sdx.data.loader import HostBatch
from sdx.parallel import sharding
from sdx.parallel.agreement import process_index
from sdx.training.program import Batch, Program


def main() -> int:
    sharding.SMALLEST_SHARDED_BYTES = 256
    place_batch = Program.place_batch

    def noted(self: Program, host: HostBatch) -> Batch:
        if "SLOW" in os.environ and host.step > 3:
            time.sleep(0.5)
        batch = place_batch(self, host)
        parts = [np.asarray(part.data).tolist() for part in batch.tokens.addressable_shards]
        starts = [part.index[0].start or 0 for part in batch.tokens.addressable_shards]
        row = {
            "step": host.step,
            "rows": [*self.host_rows],
            "indices": host.indices.tolist(),
            "tokens": dict(zip(starts, parts, strict=True)),
        }
        with open(sys.argv[1].replace("{process}", str(process_index())), "a") as file:
            file.write(json.dumps(row) + "\n")
        return batch

    Program.place_batch = noted
    return train.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
