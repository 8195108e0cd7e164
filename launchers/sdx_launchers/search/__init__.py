"""Sweeps whose values Optuna chooses."""
