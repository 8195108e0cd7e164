"""What a run would need on hardware that is not here."""
