"""Sweeps, and the places their jobs run: this machine, a SLURM cluster, TPU VMs. No JAX."""
