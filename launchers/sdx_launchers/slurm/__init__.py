"""Jobs of a SLURM cluster."""
