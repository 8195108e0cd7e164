"""A row of the table: a key, another value for it, and what is observed before and after.

Both sides are composed from what a person would type and checked as a command checks it, so that a
row also shows that nobody refuses or ignores the key. What an observer returns is a number, a
shape, a name: something that can be told beforehand.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sdx.config import resolve
from sdx.config.check import check, check_given
from sdx.config.folders import CONF
from sdx.config.overrides import inspect
from sdx.config.schema import Config, Platform
from sdx.experiment.setup import Setup, prepare
from sdx.parallel.mesh import make_mesh
from sdx.training.program import Program, build
from tests.config.quick import quick

# The embedded model with a UNet of one level, on pictures of 16 x 16: 2 x 2 latents.
BASE = (
    "model.unet.block_out_channels=[8]",
    "model.unet.down_block_types=[CrossAttnDownBlock2D]",
    "model.unet.attention_head_dim=[2]",
    "model.unet.norm_num_groups=4",
    "data.resolution=16",
    "data.num_examples=64",
    "data.caption_dropout=0",
    "diffusion.snr_gamma=null",
    "optimizer.lr=1e-3",
    "optimizer.b2=0.999",
    "train.ema_decay=0.9999",
    "train.per_device_batch_size=null",
    "train.global_batch_size=4",
    "train.max_steps=10",
    f"run.compilation_cache_dir={os.environ['JAX_COMPILATION_CACHE_DIR']}",
    "sample.num_adherence_prompts=null",
)


@dataclass(frozen=True)
class Effect:
    """`path=value` makes what `observe` sees of the configuration `after` instead of `before`."""

    path: str
    value: str
    observe: "Callable[[Case], Any]"
    before: Any
    after: Any
    given: tuple[str, ...] = ()
    """What is typed on both sides."""
    along: tuple[str, ...] = ()
    """What is typed with the value, where it cannot stand alone."""
    refused: bool = False
    """The value is one that the rules refuse, or is refused with: it is observed all the same."""


@dataclass(frozen=True)
class Case:
    """One side of a row: a configuration, and what it becomes."""

    overrides: tuple[str, ...]
    folder: Path
    """Of this case alone; the files that rows read lie beside it."""
    make: "Callable[[Sequence[str]], Case]" = field(compare=False, repr=False)

    @cached_property
    def config(self) -> Config:
        """Composed of the base and the overrides; `{files}` stands for the folder of files."""
        typed = [text.replace("{files}", str(self.folder.parent)) for text in self.overrides]
        return quick([f"run.output_dir={self.folder}", *typed], BASE)

    def other(self, overrides: Sequence[str]) -> "Case":
        """The case of other overrides."""
        return self.make(overrides)

    @property
    def problems(self) -> list[str]:
        """What a command would refuse this configuration for."""
        keys = inspect(self.overrides, [CONF]).keys
        return [str(problem) for problem in [*check(self.config), *check_given(self.config, keys)]]

    @cached_property
    def setup(self) -> Setup:
        """What a start finds: data, weights, devices."""
        return prepare(self.config)

    @cached_property
    def mesh(self) -> Mesh:
        """Over as many virtual devices as the hardware says, whatever else it says."""
        hardware = replace(self.config.hardware, platform=Platform.cpu, device_kind=None)
        count = hardware.num_devices or 1
        return make_mesh(self.config.mesh, hardware, jax.devices()[:count])

    @cached_property
    def program(self) -> Program:
        """What a run would compile; nothing is."""
        config = resolve.with_global_batch(self.config, self.mesh.size)
        return build(config, self.mesh, max_steps=resolve.max_steps(config, 64))
