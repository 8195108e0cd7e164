"""The mathematics of diffusion: noise schedule, training targets, sampler updates, guidance. No
models, no I/O."""
