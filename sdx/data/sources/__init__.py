"""Where examples come from: one file a kind, and what they share."""
