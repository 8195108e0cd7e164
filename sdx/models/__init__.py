"""The networks of Stable Diffusion 1.x and 2.x: arrays in, arrays out, no files and no mesh."""
