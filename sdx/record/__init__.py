"""A run on disk: its folder, status, lock, provenance, attempts and metrics. No JAX, no
configuration classes."""
