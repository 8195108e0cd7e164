"""What `sdx.evaluate` does: losses of runs, scores of pictures."""
