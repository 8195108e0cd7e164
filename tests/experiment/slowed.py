"""`sdx.train` that takes its time from a step on, so that a test can be sure to interrupt it.

python -m tests.experiment.slowed STEP SECONDS OVERRIDE ...
"""

import sys
import time

from sdx import train
from sdx.data.loader import HostBatch
from sdx.training.program import Batch, Program


def main() -> int:
    place_batch = Program.place_batch

    def slowed(self: Program, host: HostBatch) -> Batch:
        if host.step >= int(sys.argv[1]):
            time.sleep(float(sys.argv[2]))
        return place_batch(self, host)

    Program.place_batch = slowed
    return train.main(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
