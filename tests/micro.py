"""The one micro-model of the tests: every part of the real thing, at a size that compiles in
seconds."""

from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from sdx.config import schema
from sdx.parallel.mesh import make_mesh

RESOLUTION = 16
NUM_TOKENS = 8
BATCH_SIZE = 4


def micro_model() -> schema.ModelConfig:
    """One cross-attention level and the middle: about 30 thousand parameters in the UNet."""
    return schema.ModelConfig(
        name="micro",
        pretrained="none",
        init=schema.Init.random,
        resolution=RESOLUTION,
        prediction_type=schema.PredictionType.v_prediction,
        unet=schema.UNetConfig(
            sample_size=8,
            block_out_channels=[8],
            layers_per_block=1,
            down_block_types=[schema.DownBlock.CrossAttnDownBlock2D],
            attention_head_dim=[2],
            cross_attention_dim=8,
            norm_num_groups=4,
        ),
        vae=schema.VAEConfig(block_out_channels=[4, 8], layers_per_block=1, norm_num_groups=4),
        text_encoder=schema.TextEncoderConfig(
            vocab_size=64,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=NUM_TOKENS,
        ),
    )


def micro_config(**train: Any) -> schema.Config:
    """A whole configuration around the micro-model; keywords change `train.*`."""
    batch: dict[str, Any] = {"global_batch_size": BATCH_SIZE, "max_steps": 10}
    return schema.Config(
        model=micro_model(),
        data=schema.DataConfig(kind=schema.DataKind.shapes, num_examples=64),
        optimizer=schema.OptimizerConfig(kind=schema.OptimizerKind.adamw, lr=1e-3),
        lr_schedule=schema.LrScheduleConfig(kind=schema.LrScheduleKind.constant),
        diffusion=schema.DiffusionConfig(),
        attention=schema.AttentionConfig(),
        mesh=schema.MeshConfig(ici=schema.MeshAxes()),
        hardware=cpu(1),
        sampler=schema.SamplerConfig(kind=schema.SamplerKind.ddim),
        train=schema.TrainConfig(**(batch | train)),
    )


def cpu(num_devices: int) -> schema.HardwareConfig:
    """This machine, as so many virtual devices."""
    return schema.HardwareConfig(name="cpu", platform=schema.Platform.cpu, num_devices=num_devices)


def micro_mesh(num_devices: int = 1, **axes: int) -> Mesh:
    """A mesh over the first virtual CPU devices."""
    mesh = schema.MeshConfig(ici=replace(schema.MeshAxes(), **axes))
    return make_mesh(mesh, cpu(num_devices), jax.devices()[:num_devices])
