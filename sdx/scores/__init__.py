"""What numbers say of pictures: FID and CLIP score, from features that are handed in."""
