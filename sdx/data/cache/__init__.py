"""Encoded examples on disk: their records, writing and reading them."""
