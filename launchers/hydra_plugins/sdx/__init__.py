"""What Hydra finds of sdx: adapters of its sweepers and launchers."""
