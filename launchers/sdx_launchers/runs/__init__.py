"""What became of runs: tables, summaries, comparison, control."""
