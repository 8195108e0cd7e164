"""The TPU's own compiler takes the Pallas kernels at Stable Diffusion 2.1's shapes, forward and
backward, over the chips of a slice that is not here; what it makes has no weights of all pairs."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdx.config.schema import AttentionConfig, AttentionKind, Platform
from sdx.models.attention_choice import select_attention
from sdx.parallel.mesh import AXES
from tests.conftest import require

SLICES = {"v4": ("v4:2x2x1", {"chip_config_name": "megacore"}), "v5e": ("v5e:2x2", {})}
EXACT: dict[str, Any] = {"upcast": False, "precision": jax.lax.Precision.DEFAULT}
DEFAULT = [("v4", "flash", False), ("v5e", "splash", True)]  # the others before a release
BATCH = 4
SD21 = [(9216, 9216, 10), (576, 576, 20), (9216, 77, 10)]
"""Queries, keys and heads at 768 pixels: whole tiles, lengths that are padded, a caption. The first
level's 5 heads are 10 here, as axis tensor splits them."""
WEIGHTS_MIB = BATCH * 10 // 4 * 9216**2 * 4 / 2**20
"""Of all pairs of the first level on one of four devices; float32."""


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Mesh]]:
    """Meshes over described chips: two share the batch, two what `tensor` parts."""
    require(importlib.util.find_spec("libtpu") is not None, "libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to wait for
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor a chip to lock

    def mesh(name: str) -> Mesh:
        topology, options = SLICES[name]
        found = topologies.get_topology_desc(topology, "tpu", **options)
        return Mesh(np.array(found.devices).reshape(1, 2, 2), AXES)

    # What is compiled for them can be stored, but not read back without them.
    jax.config.update("jax_enable_compilation_cache", False)  # tests/conftest.py sets it back
    reset_cache()
    yield mesh
    reset_cache()


def compiled(mesh: Mesh, kind: AttentionKind, shard_sequence: bool) -> jax.stages.Compiled:
    """The gradients of attention at all these shapes, each by the kernel."""
    config = AttentionConfig(kind=kind, min_sequence=77, shard_sequence=shard_sequence)
    attention = select_attention(config, Platform.tpu, dtype="bfloat16", mesh=mesh)

    def total(*given: jax.Array) -> jax.Array:
        each = (attention(*given[i : i + 3], **EXACT) for i in range(0, len(given), 3))
        return sum((jnp.sum(y.astype(jnp.float32)) for y in each), start=jnp.float32(0))

    place = NamedSharding(mesh, P(("data", "fsdp")))
    inputs = [
        jax.ShapeDtypeStruct((BATCH, length, heads, 64), jnp.bfloat16, sharding=place)
        for queries, keys, heads in SD21
        for length in (queries, keys, keys)
    ]
    return jax.jit(jax.grad(total, tuple(range(len(inputs))))).lower(*inputs).compile()


CASES = [
    pytest.param(
        chip, kind, shard_sequence, marks=[] if in_default else [pytest.mark.release],
        id=f"{chip}-{kind.name}-{'queries' if shard_sequence else 'heads'}",
    )
    for chip in SLICES
    for kind in (AttentionKind.flash, AttentionKind.splash)
    for shard_sequence in (False, True)
    for in_default in [(chip, kind.name, shard_sequence) in DEFAULT]
]  # fmt: skip


@pytest.mark.parametrize(("chip", "kind", "shard_sequence"), CASES)
def test_a_slice_takes_the_kernels(
    chip: str, kind: AttentionKind, shard_sequence: bool, described: Callable[[str], Mesh]
) -> None:
    """Three calls for each attention: forward, and both kernels of the backward."""
    program = compiled(described(chip), kind, shard_sequence)
    assert (program.as_text() or "").count('custom_call_target="tpu_custom_call"') == 3 * len(SD21)
    memory: Any = program.memory_analysis()
    assert memory.temp_size_in_bytes / 2**20 < WEIGHTS_MIB / 4
