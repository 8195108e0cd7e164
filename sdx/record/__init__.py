"""A run on disk: folder, status, lock, provenance, attempts, metrics. No JAX, no configuration."""
