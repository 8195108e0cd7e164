"""Pretrained weights: diffusers-layout folders, their names and their configs. NCHW ends here."""
