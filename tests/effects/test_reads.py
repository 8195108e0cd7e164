"""No key is there in vain: real runs read it, or starts and plans of what else can be chosen."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from sdx.config.leaves import leaves
from sdx.experiment.planning import make_plan
from sdx.planning.report import render
from tests.effects.data import source
from tests.effects.described import V4, asked
from tests.effects.effect import Case
from tests.effects.flags import environment
from tests.effects.kernels import long_attention
from tests.effects.processes import GIVEN, joined
from tests.effects.reads import recorded
from tests.effects.runs import CHANGED, FORK, PLAIN, finished, wandb_run

RUNS = (PLAIN, (*PLAIN, *CHANGED), (*PLAIN, *FORK))
# What is read only where something else is chosen, up to where a run would compile.
STARTS = (
    ("lr_schedule=polynomial", "lr_schedule.warmup_fraction=0.1", "train.max_steps=100"),
    ("lr_schedule=cosine_with_restarts", "train.text_encoder=true"),
    ("diffusion.timestep_bias.strategy=range", "diffusion.timestep_bias.multiplier=2"),
    ("diffusion.timestep_bias.strategy=later", "diffusion.timestep_bias.multiplier=2"),
    ("train.global_batch_size=null", "train.per_device_batch_size=2"),
    ("data=imagefolder", "data.dir={files}/pictures", "data.resolution=null"),
    ("data=parquet", "data.dir={files}/tables"),
    ("data=huggingface", "data.dir={files}/tables", "data.config=large"),
    ("data=plugin", "data.plugin=one"),
    ("hardware.platform=tpu", "attention=splash"),
    V4,
    GIVEN,
)
EPOCHS = ("train.max_steps=null", "train.epochs=1", "run.name=epochs")  # steps follow from the data
ELSEWHERE = {
    "schema_version": "read from the saved file, before there is a configuration",
}
"""Keys that none of these read, and where they are."""


def test_every_key_is_read(case: Callable[[Sequence[str]], Case]) -> None:
    read = set[str]().union(*(finished(case(overrides)).reads for overrides in RUNS))
    for overrides in STARTS:
        with recorded() as found:
            start = case([*overrides, "run.name=start"])  # a case of its own
            environment(start)
            asked(start)
            joined(start)
            render(make_plan(start.config, compiles=False, level="O0"))
            assert len(source(start)) > 0 and long_attention(start) and wandb_run(start)
            assert [rate(jnp.int32(0)) for rate in start.program.rule.rates.values()]
        read |= found
    with recorded() as found:
        assert case(EPOCHS).setup.max_steps > 0
    read |= found
    unread = [path for path in leaves() if path not in read | ELSEWHERE.keys()]
    assert unread == [], unread
    assert read & ELSEWHERE.keys() == set()


def test_a_key_that_only_copies_and_checks_touch_is_not_read(
    case: Callable[[Sequence[str]], Case],
) -> None:
    config = case(()).config
    with recorded() as found:
        assert case(("run.name=mine",)).problems == [] and config == case(()).config
        assert found == set()
        assert case(()).program.rule.ema_decay == config.train.ema_decay
