"""sdx trains Stable Diffusion with JAX. `sdx.load` gives a trained model as a `Pipeline`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdx.pipeline import Pipeline, load

__all__ = ["Pipeline", "load"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for: the commands must start without JAX."""
    if name not in __all__:
        raise AttributeError(f"module 'sdx' has no attribute {name!r}")
    from sdx import pipeline

    return getattr(pipeline, name)
