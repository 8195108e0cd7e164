"""What one host's memory must hold, roughly: it differs by phase, and the largest counts."""

from dataclasses import dataclass

from sdx.config.schema import Cache, Config
from sdx.planning.compiled import GIB

PROCESS_BYTES = int(2.0 * GIB)
"""Python, JAX, its compiler and a platform's libraries, before any array."""
WORKER_BYTES = int(0.4 * GIB)
"""A loader process."""
BATCHES_AHEAD = 3  # decoded, placed, in flight


@dataclass(frozen=True)
class HostBytes:
    """Phases of a run on one host; a process for each of its devices holds this together."""

    process: int
    loading: int
    """Every process reads the weights whole, in float32."""
    staging: int
    """A checkpoint on its way to disk."""
    loader: int
    """Decoded batches, and the processes that make them."""
    available: int | None

    @property
    def total(self) -> int:
        """The most at a time."""
        return self.process + max(self.loading, self.staging + self.loader)

    @property
    def fits(self) -> bool | None:
        """None where the preset does not say what a host has."""
        return None if self.available is None else self.total <= self.available


def host_bytes(
    config: Config, *, networks: int, checkpoint: int, batch: int, num_devices: int
) -> HostBytes:
    """What one of `config.hardware.num_hosts` needs; the bytes are those of all hosts together.

    Copies of the state are saved once, by the devices of one copy: where `fsdp` and `tensor` lie
    within a host, that host stages all of it.
    """
    hardware, mesh = config.hardware, config.mesh
    hosts = hardware.num_hosts
    spread = 1 if max(mesh.ici.fsdp, mesh.dcn.fsdp) == 1 else hosts
    workers = config.data.num_workers * WORKER_BYTES
    text_states = 2 if config.data.cache is Cache.moments_and_context else 1
    memory = hardware.host_memory_gib
    return HostBytes(
        process=PROCESS_BYTES,
        loading=networks,
        staging=checkpoint // spread,
        loader=workers + text_states * BATCHES_AHEAD * batch // hosts,
        available=None if memory is None else int(memory * GIB),
    )
