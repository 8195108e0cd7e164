"""One run from its configuration to its finished record: what is looked at first, what is drawn,
and the acts in order."""
