"""Drawing pictures: the guided denoising loop."""
