"""`xla.*`: what JAX, jaxlib and libtpu find in the environment."""

import sys

import pytest

from sdx.parallel import xla_flags
from sdx.parallel.xla_flags import VARIABLES, flags_in_force, set_flags
from tests.effects.effect import Case, Effect

FAST = "--xla_cpu_enable_fast_math=true"
FUSION = "--xla_tpu_rwb_fusion=false"


def environment(case: Case) -> dict[str, str]:
    """The variables of flags as a command sets them, in a process without any."""
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.setenv(name, "")
        for state in ("_found", "_in_force"):
            patch.setattr(xla_flags, state, {})
        patch.setattr(xla_flags, "bad_flags", lambda *_: [])
        patch.delitem(sys.modules, "jax")
        set_flags(case.config.xla, case.config.hardware, None)
        return flags_in_force()


EFFECTS = [
    Effect("xla.flags", f"['{FAST}']", environment, {}, {"XLA_FLAGS": FAST}),
    Effect(
        "xla.libtpu_args",
        f"['{FUSION}']",
        environment,
        {},
        {"LIBTPU_INIT_ARGS": FUSION},
        given=("hardware.platform=tpu",),
    ),
    Effect(
        "xla.memory_fraction",
        "0.5",
        environment,
        {},
        {"XLA_CLIENT_MEM_FRACTION": "0.5"},
        given=("hardware.platform=gpu",),
    ),
]
