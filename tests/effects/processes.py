"""`distributed.*` and `hardware.simulate`: what JAX is told of the other processes, and what a
start takes for the chips of a preset."""

from collections.abc import Callable
from typing import Any

import jax
import pytest

from sdx.parallel import distributed
from sdx.parallel.distributed import start_processes
from tests.effects.effect import Case, Effect
from tests.effects.place import devices


def joined(case: Case) -> dict[str, Any]:
    """What a start tells `jax.distributed.initialize`; nothing where it is alone."""
    told: dict[str, Any] = {}

    def initialize(address: str, count: int, number: int, **others: Any) -> None:
        told.update(address=address, count=count, number=number, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.distributed, "initialize", initialize)
        patch.setattr(distributed, "_silence_gloo", lambda: None)
        start_processes(case.config.distributed, case.config.hardware, print)
    return told


def _told(name: str) -> Callable[[Case], Any]:
    return lambda case: joined(case).get(name)


GIVEN = (
    "hardware.num_devices=4",
    "mesh=dp",
    "distributed.coordinator_address=one:1",
    "distributed.num_processes=4",
    "distributed.process_id=0",
)
_EFFECTS = [
    ("coordinator_address", "two:2", _told("address"), "one:1", "two:2"),
    ("num_processes", "2", _told("count"), 4, 2),
    ("process_id", "3", _told("number"), 0, 3),
    # JAX's own come after ours, which say why.
    ("initialization_timeout_s", "20", _told("initialization_timeout"), 3000, 200),
    ("heartbeat_timeout_s", "20", _told("heartbeat_timeout_seconds"), 205, 45),
    ("shutdown_timeout_s", "20", _told("shutdown_timeout_seconds"), 30, 20),
]
_V5E = ("hardware=tpu_v5e_8", "train.global_batch_size=8")
_NOT_HERE = [
    "hardware.platform: found cpu, wanted tpu",
    "hardware.device_kind: found cpu, wanted TPU v5 lite",
]

EFFECTS = [
    *(
        Effect(f"distributed.{key}", value, observe, before, after, GIVEN)
        for key, value, observe, before, after in _EFFECTS
    ),
    Effect("hardware.simulate", "true", devices, _NOT_HERE, 8, _V5E),
]
