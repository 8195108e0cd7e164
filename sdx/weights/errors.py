"""What is wrong with a folder of weights, all of it at once."""

SHOWN = 24


class WeightsError(ValueError):
    """A folder of weights that cannot be used; `faults` has every one, the message the first."""

    def __init__(
        self, summary: str, faults: list[str] | None = None, hints: list[str] | None = None
    ):
        self.faults = faults or []
        lines = [summary, *(f"  {fault}" for fault in self.faults[:SHOWN])]
        if len(self.faults) > SHOWN:
            lines.append(f"  and {len(self.faults) - SHOWN} more")
        super().__init__("\n".join([*lines, *(f"  {hint}" for hint in hints or [])]))
