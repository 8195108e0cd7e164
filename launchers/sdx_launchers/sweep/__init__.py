"""Jobs of a sweep: planned, started, watched, told of."""
