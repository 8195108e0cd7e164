"""Whether a run fits, from the estimate and, where it was compiled, from XLA's own account."""

from dataclasses import dataclass

from sdx.planning.advice import Advice
from sdx.planning.compiled import CompiledReport
from sdx.planning.estimate import Estimate, Fits


@dataclass(frozen=True)
class Plan:
    """Everything that is said of one configuration."""

    estimate: Estimate
    compiled: CompiledReport | None
    advice: tuple[Advice, ...]
    smallest_bytes: int | None
    """Of one device with every change there is, where no advice is enough."""
    others: tuple[Estimate, ...]
    """The same run at other resolutions."""
    notes: tuple[str, ...]

    @property
    def fits(self) -> Fits:
        """The estimate's answer alone; with the compiler's: `no` where both exceed the memory,
        `yes` where it compiled and the estimate does not exceed it, `undecided` where they differ.
        """
        return combined(self.estimate, self.compiled)


def combined(estimate: Estimate, compiled: CompiledReport | None) -> Fits:
    """What both say together."""
    compiled_fits = compiler_says(estimate, compiled)
    if compiled_fits is None:
        return estimate.fits
    if compiled_fits == (estimate.fits != "no"):
        return "yes" if compiled_fits else "no"
    return "undecided"


def compiler_says(estimate: Estimate, compiled: CompiledReport | None) -> bool | None:
    """Whether what was compiled fits; None where nothing was, or the memory is not known."""
    if compiled is None or estimate.usable_bytes is None:
        return None
    return compiled.fits(estimate.usable_bytes)
