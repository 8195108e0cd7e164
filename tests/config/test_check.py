"""Rules over several keys: each is broken once, and the text says how to mend it."""

import dataclasses
from typing import Any

import pytest

from sdx.config.check import check, check_given, has_effect
from sdx.config.folders import CONF
from sdx.config.leaves import leaves
from sdx.config.overrides import inspect
from sdx.config.schema import SampleConfig
from tests.config.quick import quick

pytestmark = pytest.mark.fast

PHOTOS = "data=imagefolder data.dir=photos"
TWO_SLICES = "hardware=tpu_v4_32 hardware.num_slices=2"
RULES = {
    "bound": ("optimizer.eps=0", "optimizer.eps=0: must be above 0."),
    "two-sided bound": ("optimizer.b1=1", "optimizer.b1=1: must be at least 0 and below 1."),
    "not a number": ("optimizer.lr=nan", "optimizer.lr=nan: must be a finite number."),
    "peers' -1": (
        "checkpoint.every=-1",
        "checkpoint.every=-1: must be at least 0; null = off.",
    ),
    "folder missing": (
        "data=imagefolder",
        "data.dir: missing; data=imagefolder needs data.dir=FOLDER.",
    ),
    "folder without use": (
        "data.dir=photos",
        "data.dir=photos: has no effect here; it needs data=imagefolder, huggingface, parquet,"
        " webdataset or arrayrecord.",
    ),
    "judge without shapes": (
        f"{PHOTOS} sample.num_adherence_prompts=10",
        "sample.num_adherence_prompts=10: has no effect here; it needs data=shapes.",
    ),
    "examples missing": (
        "data.num_examples=null",
        "data.num_examples=null: data=shapes needs a number of examples.",
    ),
    "too many samples": (
        "data.num_examples=10 train.max_samples=11",
        "train.max_samples=11: at most data.num_examples=10.",
    ),
    "dataset missing": (
        "data=huggingface",
        "data.name: missing; data=huggingface needs data.name=OWNER/NAME, or data.dir=FOLDER for a"
        " local copy.",
    ),
    "two sources": (
        "data=pokemon data.dir=copy data.name=somebody/pictures",
        "data.name=somebody/pictures: has no effect here; it needs data=huggingface without"
        " data.dir.",
    ),
    "name of another kind": (
        f"{PHOTOS} data.name=somebody/pictures",
        "data.name=somebody/pictures: has no effect here; it needs data=huggingface without"
        " data.dir.",
    ),
    "no name of a dataset": (
        "data=huggingface data.name=pictures",
        "data.name=pictures: must be OWNER/NAME, or the path of a folder.",
    ),
    "commit of a local copy": (
        "data=pokemon data.dir=copy data.revision=main",
        "data.revision=main: has no effect here; it needs data=huggingface without data.dir.",
    ),
    "pattern of a folder of images": (
        f"{PHOTOS} data.files=a*",
        "data.files=a*: has no effect here; it needs data=parquet, webdataset or arrayrecord.",
    ),
    "pattern that leaves": (
        "data=webdataset data.dir=shards data.files=../*.tar",
        "data.files=../*.tar: must be a pattern below data.dir, such as *.tar.",
    ),
    "pattern that is a command": (
        "data=webdataset data.dir=shards data.files='pipe:cat'",
        "data.files=pipe:cat: must be a pattern below data.dir, such as *.tar.",
    ),
    "address of a folder": (
        "data=parquet data.dir=s3://bucket/tables",
        "data.dir=s3://bucket/tables: must be a folder of this machine: sources are read by their"
        " files; copy or mount the data.",
    ),
    "plugin missing": (
        "data=plugin",
        "data.plugin: missing; data=plugin needs data.plugin=NAME.",
    ),
    "options without plugin": (
        f"{PHOTOS} data.options={{folder:x}}",
        "data.options={folder:x}: has no effect here; it needs data=plugin.",
    ),
    "options that JSON cannot hold": (
        "data=plugin data.plugin=mine data.options={rate:inf}",
        "data.options={rate:inf}: must hold texts, finite numbers, true, false, null, lists and"
        " maps only.",
    ),
    "column of a folder of images": (
        f"{PHOTOS} data.image_column=picture",
        "data.image_column=picture: has no effect here; it needs data=huggingface, parquet or"
        " arrayrecord.",
    ),
    "no slice": (
        "data.split='train[:x]'",
        "data.split=train[:x]: its bounds must be whole numbers or whole percentages.",
    ),
    "split is a path": (
        "data.split=../secret",
        "data.split=../secret: must be the name of a split, not a path.",
    ),
    "measured on what is trained on": (
        "eval.every=10 eval.split=train",
        "eval.split=train: data.split=train trains on some of these; give parts that do not meet:"
        """ 'data.split="train[:95%]"' 'eval.split="train[95%:]"'.""",
    ),
    "measured on a part of what is trained on": (
        'eval.every=10 data.split="train[:96%]" eval.split="train[95%:]"',
        "eval.split=train[95%:]: data.split=train[:96%] trains on some of these; give parts that do"
        """ not meet: 'data.split="train[:95%]"' 'eval.split="train[95%:]"'.""",
    ),
    "no part at all": (
        'eval.every=10 eval.split="train[x:]"',
        "eval.split=train[x:]: its bounds must be whole numbers or whole percentages.",
    ),
    "finer than the schedule": (
        "eval.every=10 eval.num_buckets=1001",
        "eval.num_buckets=1001: at most diffusion.num_train_timesteps=1000.",
    ),
    "split that nothing measures": (
        "eval.split=test",
        "eval.split=test: has no effect here; it needs eval.every=N.",
    ),
    "best of what": (
        "checkpoint.keep_best=2",
        "checkpoint.keep_best=2: has no effect here; it needs eval.every=N.",
    ),
    "best of those at the end": (
        "checkpoint.keep_best=2 eval.every=7 train.max_steps=2000",
        "checkpoint.keep_best=2: checkpoint.every=300 and eval.every=7 do not meet before the end,"
        " and only checkpoints that are measured are compared; make checkpoint.every a multiple of"
        " eval.every.",
    ),
    "best of the end": (
        "checkpoint.keep_best=2 eval.every=0 checkpoint.every=null",
        "checkpoint.keep_best=2: checkpoint.every=null and eval.every=0 do not meet before the end,"
        " and only checkpoints that are measured are compared; make checkpoint.every a multiple of"
        " eval.every.",
    ),
    "trace longer than the run": (
        "profiler.enabled=true profiler.steps=3 train.max_steps=4",
        "profiler.steps=3: with profiler.skip_steps=2 at most train.max_steps=4.",
    ),
    "trace of nothing": (
        "profiler.skip_steps=3",
        "profiler.skip_steps=3: has no effect here; it needs profiler.enabled=true.",
    ),
    "no length": (
        "train.max_steps=null",
        "train.max_steps=null: missing; set it or train.epochs.",
    ),
    "epochs overruled": (
        "train.epochs=3 train.max_steps=7",
        "train.epochs=3: has no effect, train.max_steps=7 wins; add train.max_steps=null.",
    ),
    "batch overruled": (
        "train.per_device_batch_size=3 train.global_batch_size=8",
        "train.per_device_batch_size=3: has no effect, train.global_batch_size=8 wins;"
        " add train.global_batch_size=null.",
    ),
    "warm-up ignored": (
        "lr_schedule.warmup_steps=5",
        "lr_schedule.warmup_steps=5: has no effect here;"
        " it needs lr_schedule=constant_with_warmup.",
    ),
    "two warm-ups": (
        "lr_schedule=constant_with_warmup lr_schedule.warmup_fraction=0.1",
        "lr_schedule.warmup_fraction=0.1: lr_schedule.warmup_steps=100 is set too;"
        " give one: add lr_schedule.warmup_steps=null.",
    ),
    "no warm-up": (
        "lr_schedule=constant_with_warmup lr_schedule.warmup_steps=null",
        "lr_schedule.warmup_steps=null: missing; set it or lr_schedule.warmup_fraction.",
    ),
    "warm-up without end": (
        "lr_schedule=cosine lr_schedule.warmup_steps=9 train.max_steps=9",
        "lr_schedule.warmup_steps=9: the warm-up must end before train.max_steps=9.",
    ),
    "polynomial upwards": (
        "lr_schedule=polynomial optimizer.lr=1e-7",
        "lr_schedule.end_lr=1e-7: must be below optimizer.lr=1e-7.",
    ),
    "power without polynomial": (
        "lr_schedule=cosine lr_schedule.power=2",
        "lr_schedule.power=2: has no effect here; it needs lr_schedule=polynomial.",
    ),
    "decay without end": (
        "lr_schedule.decay_steps=5",
        "lr_schedule.decay_steps=5: has no effect here;"
        " it needs a schedule that decays, such as cosine.",
    ),
    "average off": (
        "train.ema=false train.ema_decay=0.5",
        "train.ema_decay=0.5: has no effect here; it needs train.ema=true.",
    ),
    "betas": (
        "diffusion.beta_start=0.02",
        "diffusion.beta_start=0.02: must be below diffusion.beta_end=0.012.",
    ),
    "sampler steps": (
        "sample.num_steps=11 diffusion.num_train_timesteps=10",
        "sample.num_steps=11: at most 9 with sampler=ddim, diffusion.num_train_timesteps=10 and"
        " diffusion.timestep_spacing=leading.",
    ),
    "more steps than this sampler has": (
        "sampler=dpmpp_2m diffusion.timestep_spacing=linspace sample.num_steps=10"
        " diffusion.num_train_timesteps=10",
        "sample.num_steps=10: at most 9 with sampler=dpmpp_2m, diffusion.num_train_timesteps=10 and"
        " diffusion.timestep_spacing=linspace.",
    ),
    "a sampler without zero terminal SNR": (
        "sampler=pndm diffusion.rescale_zero_terminal_snr=true",
        "sampler.kind=pndm: is not defined for diffusion.rescale_zero_terminal_snr=true;"
        " use ddim, ddpm, euler or dpmpp_2m.",
    ),
    "a sampler without sample prediction": (
        "diffusion.class_name=PNDMScheduler diffusion.prediction_type=sample",
        "sampler.kind=pndm: is not defined for prediction_type=sample;"
        " use ddim, ddpm, euler or dpmpp_2m.",
    ),
    "noise alone, divided by its signal": (
        "diffusion.prediction_type=epsilon diffusion.rescale_zero_terminal_snr=true"
        " diffusion.timestep_spacing=trailing",
        "sampler.kind=ddim: divides by zero at the last timestep, where"
        " diffusion.rescale_zero_terminal_snr=true leaves only noise;"
        " use diffusion.prediction_type=v_prediction, sampler=euler, sampler=dpmpp_2m or"
        " diffusion.timestep_spacing=leading.",
    ),
    "noise alone, reached by so many steps": (
        "diffusion.prediction_type=epsilon diffusion.rescale_zero_terminal_snr=true"
        " sample.num_steps=500",
        "sample.num_steps=500: begins at the last timestep, where sampler=ddim would divide by"
        " zero signal; use one step fewer.",
    ),
    "rescaled guidance without guidance": (
        "sample.guidance_scale=1 sample.guidance_rescale=0.7",
        "sample.guidance_rescale=0.7: has no effect here; it needs sample.guidance_scale above 1.",
    ),
    "a first moment that Adafactor has not": (
        "optimizer=adafactor optimizer.b1=0.5",
        "optimizer.b1=0.5: has no effect here; it needs optimizer=adamw or lion.",
    ),
    "a decay that is Adafactor's own": (
        "optimizer=adafactor optimizer.b2=0.95",
        "optimizer.b2=0.95: has no effect here; it needs optimizer=adamw or lion.",
    ),
    "a kernel of other machines": (
        "attention=cudnn",
        "attention.kind=cudnn: is a kernel for gpu, hardware=cpu is cpu; use attention=auto.",
    ),
    "a kernel of TPUs on GPUs": (
        "model=sd21 hardware=gpu_h100_1 attention=splash",
        "attention.kind=splash: is a kernel for tpu, hardware=gpu_h100_1 is gpu;"
        " use attention=auto.",
    ),
    "cuDNN in float32": (
        "model=sd21 hardware=gpu_h100_1 attention=cudnn model.activations_dtype=float32",
        "model.activations_dtype=float32: attention=cudnn takes bfloat16;"
        " use model.activations_dtype=bfloat16, or attention=auto.",
    ),
    "wide heads for cuDNN": (
        "model=sd15 hardware=gpu_h100_1 attention=cudnn",
        "attention.kind=cudnn: takes head dims up to 128 in steps of 8, level 2 has 160 over 256"
        " tokens; use attention=auto, or attention.min_sequence=257.",
    ),
    "queries split over nothing": (
        "attention.shard_sequence=true",
        "attention.shard_sequence=true: has no effect here; it needs mesh.ici.tensor above 1.",
    ),
    "queries that do not divide": (
        "model=sd21 hardware=gpu_h100_8 mesh.ici.tensor=8 mesh.ici.data=1 mesh.ici.fsdp=1"
        " data.resolution=576 attention.shard_sequence=true train.global_batch_size=8",
        "attention.shard_sequence=true: mesh axis tensor=8 must divide the tokens of every level,"
        " of 576x576 pixels level 2 has 324, level 3 has 81; use attention.shard_sequence=false.",
    ),
    "queries that divide by less": (
        "model=sd15 hardware=gpu_h100_8 mesh.ici.tensor=8 mesh.ici.data=1 mesh.ici.fsdp=1"
        " data.resolution=384 attention.shard_sequence=true train.global_batch_size=8",
        "attention.shard_sequence=true: mesh axis tensor=8 must divide the tokens of every level,"
        " of 384x384 pixels level 3 has 36; use a tensor axis of 2 or 4, or"
        " attention.shard_sequence=false.",
    ),
    "tiles without a kernel": (
        "attention.block_sizes.block_q=256",
        "attention.block_sizes.block_q=256: has no effect here; it needs attention=flash or"
        " splash.",
    ),
    "tiles that are no tiles": (
        "model=sd21 hardware=tpu_v4_8 attention.block_sizes.block_kv=200",
        "attention.block_sizes.block_kv=200: must be a multiple of 128, the lanes of a TPU.",
    ),
    "tiles that do not divide": (
        "model=sd21 hardware=tpu_v4_8 attention.block_sizes.block_kv=512"
        " attention.block_sizes.block_kv_compute=384",
        "attention.block_sizes.block_kv_compute=384: must divide"
        " attention.block_sizes.block_kv=512.",
    ),
    "a layout that nothing has": (
        "attention.split_head_dim=false",
        "attention.split_head_dim=false: has no effect here; it needs attention=dot_product.",
    ),
    "lengths that decide nothing": (
        "attention=dot_product attention.min_sequence=77",
        "attention.min_sequence=77: has no effect here; it needs attention=flash, splash or cudnn.",
    ),
    "a project nobody is told": (
        "metrics.wandb.project=birds",
        "metrics.wandb.project=birds: has no effect here; it needs metrics.sinks=[wandb].",
    ),
    "an epsilon that Lion has not": (
        "optimizer=lion optimizer.eps=1e-6",
        "optimizer.eps=1e-6: has no effect here; it needs optimizer=adamw.",
    ),
    "resolution": (
        "model=sd21 data.resolution=500",
        "data.resolution=500: must be a multiple of 64 (VAE x UNet levels of model=sd21);"
        " use 448 or 512.",
    ),
    "native resolution": (
        "model=sd21 model.resolution=512",
        "model.resolution=512: must be 8 x model.unet.sample_size=96;"
        " data.resolution is the size of training.",
    ),
    "no UNet in tiny": (
        "model.init=pretrained",
        "model.init=pretrained: the embedded model has no UNet to start from;"
        " use model.init=random, or give model.unet_checkpoint.",
    ),
    "a UNet that is not read": (
        "model.unet_checkpoint=unet",
        "model.unet_checkpoint=unet: is not read with model.init=random;"
        " add model.init=pretrained.",
    ),
    "DREAM of v": (
        "diffusion.dream=1",
        "diffusion.dream=1: DREAM is defined for epsilon, this model learns v_prediction;"
        " use null.",
    ),
    "a bias that biases nothing": (
        "diffusion.timestep_bias.strategy=later",
        "diffusion.timestep_bias.multiplier=1: strategy=later biases nothing with it;"
        " set it, 2 for instance.",
    ),
    "a range of timesteps from its end": (
        "diffusion.timestep_bias.strategy=range diffusion.timestep_bias.multiplier=2"
        " diffusion.timestep_bias.begin=500 diffusion.timestep_bias.end=499",
        "diffusion.timestep_bias.begin=500: must be at most diffusion.timestep_bias.end=499.",
    ),
    "a range of timesteps past the last": (
        "diffusion.timestep_bias.strategy=range diffusion.timestep_bias.multiplier=2"
        " diffusion.timestep_bias.end=1000",
        "diffusion.timestep_bias.end=1000: at most 999, the last timestep.",
    ),
    "a range of all timesteps": (
        "diffusion.timestep_bias.strategy=range diffusion.timestep_bias.multiplier=2",
        "diffusion.timestep_bias.end=999: with diffusion.timestep_bias.begin=0 all timesteps are"
        " biased alike; give a part of them.",
    ),
    "all timesteps as a portion": (
        "diffusion.timestep_bias.strategy=earlier diffusion.timestep_bias.multiplier=2"
        " diffusion.timestep_bias.portion=1",
        "diffusion.timestep_bias.portion=1: strategy=earlier biases all timesteps alike with it;"
        " use less, 0.25 for instance.",
    ),
    "the portion of a range": (
        "diffusion.timestep_bias.strategy=range diffusion.timestep_bias.multiplier=2"
        " diffusion.timestep_bias.begin=500 diffusion.timestep_bias.portion=0.5",
        "diffusion.timestep_bias.portion=0.5: has no effect here;"
        " it needs diffusion.timestep_bias.strategy=earlier or later.",
    ),
    "a rate of a text encoder that is frozen": (
        "optimizer.text_encoder_lr=1e-6",
        "optimizer.text_encoder_lr=1e-6: has no effect here; it needs train.text_encoder=true.",
    ),
    "an upload without a name": (
        "export.push_to_hub=true",
        "export.hub_model_id: missing; export.push_to_hub=true needs"
        " export.hub_model_id=OWNER/NAME.",
    ),
    "an upload to nowhere": (
        "export.push_to_hub=true export.hub_model_id=me",
        "export.hub_model_id=me: must be OWNER/NAME.",
    ),
    "an upload of nothing": (
        "export.push_to_hub=true export.hub_model_id=me/it export.at_end=false",
        "export.push_to_hub=true: nothing is exported; add export.at_end=true.",
    ),
    "list lengths": (
        "model=sd21 model.unet.attention_head_dim=[5,10]",
        "model.unet.attention_head_dim=[5,10]: must have 4 items,"
        " as many as model.unet.block_out_channels=[320,640,1280,1280].",
    ),
    "no levels": (
        "model=sd21 model.vae.block_out_channels=[]",
        "model.vae.block_out_channels=[]: must be positive numbers, one for each level.",
    ),
    "norm groups": (
        "model=sd21 model.unet.norm_num_groups=48",
        "model.unet.norm_num_groups=48: must divide 320, 640, 1280 channels.",
    ),
    "VAE norm groups": (
        "model=sd21 model.vae.norm_num_groups=48",
        "model.vae.norm_num_groups=48: must divide 128, 256, 512 channels.",
    ),
    "heads": (
        "model=sd21 model.unet.attention_head_dim=[5,10,7,20]",
        "model.unet.attention_head_dim=[5,10,7,20]: level 2: 7 heads must divide its"
        " 1280 channels.",
    ),
    "text heads": (
        "model=sd21 model.text_encoder.num_attention_heads=7",
        "model.text_encoder.num_attention_heads=7: must divide 1024 channels.",
    ),
    "text width": (
        "model=sd21 model.unet.cross_attention_dim=768",
        "model.unet.cross_attention_dim=768: must equal model.text_encoder.hidden_size=1024.",
    ),
    "latent channels": (
        "model=sd21 model.unet.in_channels=9",
        "model.unet.in_channels=9: must equal model.vae.latent_channels=4.",
    ),
    "hosts": (
        "hardware=tpu_v4_32 hardware.num_hosts=3",
        "hardware.num_devices=16: must be a multiple of hardware.num_hosts=3.",
    ),
    "mesh axis": (
        "hardware=gpu_h100_8 mesh.ici.fsdp=6",
        "mesh.ici.fsdp=6: must divide the 8 devices of hardware=gpu_h100_8; use 1, 2, 4 or 8.",
    ),
    "mesh product": (
        "hardware=gpu_h100_8 mesh=single",
        "mesh.ici: data 1 x fsdp 1 x tensor 1 is 1, but there are 8 devices of"
        " hardware=gpu_h100_8; use mesh.ici.data=8, or mesh.ici.fsdp=8, or mesh.ici.tensor=8,"
        " or axes whose product is 8.",
    ),
    "mesh too large": (
        "hardware=gpu_h100_8 mesh.ici.fsdp=4 mesh.ici.tensor=4",
        "mesh.ici: fsdp 4 x tensor 4 is 16, but there are 8 devices of hardware=gpu_h100_8;"
        " use mesh.ici.fsdp=1 or 2, or mesh.ici.tensor=1 or 2, or axes whose product divides 8.",
    ),
    "mesh axis within a host": (
        "hardware=gpu_h100_8x8 mesh=hsdp mesh.ici.fsdp=3",
        "mesh.ici.fsdp=3: must divide the 8 devices of hardware=gpu_h100_8x8 in each of the 8"
        " parts of mesh.dcn; use 1, 2, 4 or 8.",
    ),
    "mesh axis over hosts": (
        "hardware=gpu_h100_8x8 mesh.dcn.data=3",
        "mesh.dcn.data=3: must divide the 8 hosts of hardware=gpu_h100_8x8; use 1, 2, 4 or 8.",
    ),
    "mesh over more hosts than there are": (
        "hardware=gpu_h100_8x8 mesh.dcn.data=4 mesh.dcn.fsdp=4",
        "mesh.dcn: data 4 x fsdp 4 x tensor 1 is 16, but there are 8 hosts of"
        " hardware=gpu_h100_8x8; use mesh.dcn.data=1 or 2, or mesh.dcn.fsdp=1 or 2,"
        " or axes whose product divides 8.",
    ),
    "mesh over one of two slices": (
        f"{TWO_SLICES} mesh.dcn.fsdp=1",
        "mesh.dcn: data 1 x fsdp 1 x tensor 1 is 1, but there are 2 slices of"
        " hardware=tpu_v4_32; use mesh.dcn.data=2, or mesh.dcn.fsdp=2, or mesh.dcn.tensor=2,"
        " or axes whose product is 2.",
    ),
    "mesh axis within a slice": (
        f"{TWO_SLICES} mesh.ici.tensor=16",
        "mesh.ici.tensor=16: must divide the 8 devices of hardware=tpu_v4_32 in each of the 2"
        " parts of mesh.dcn; use 1, 2, 4 or 8.",
    ),
    "mesh over slices fills twice": (
        f"{TWO_SLICES} mesh.dcn.data=-1",
        "mesh.dcn.fsdp=-1: only one axis may fill, mesh.dcn.data does.",
    ),
    "mesh over no hosts": (
        "mesh.dcn.tensor=-2",
        "mesh.dcn.tensor=-2: must be at least 1, or -1 to fill.",
    ),
    "batch over slices": (
        f"{TWO_SLICES} mesh=hsdp train.global_batch_size=24",
        "train.global_batch_size=24: must be a multiple of mesh data x fsdp = 16; use 16 or 32.",
    ),
    "mesh fills twice": (
        "hardware=gpu_h100_8 mesh.ici.fsdp=-1",
        "mesh.ici.fsdp=-1: only one axis may fill, mesh.ici.data does.",
    ),
    "mesh zero": (
        "mesh.ici.tensor=0",
        "mesh.ici.tensor=0: must be at least 1, or -1 to fill.",
    ),
    "global batch": (
        "hardware=gpu_h100_8 train.global_batch_size=100",
        "train.global_batch_size=100: must be a multiple of mesh data x fsdp = 8; use 96 or 104.",
    ),
    "accumulated batch": (
        "hardware=gpu_h100_8 train.gradient_accumulation=3 train.global_batch_size=32",
        "train.global_batch_size=32: must be a multiple of mesh data x fsdp x"
        " gradient_accumulation = 24; use 24 or 48.",
    ),
    "fraction of an example": (
        "hardware=gpu_h100_8 mesh.ici.tensor=2 train.per_device_batch_size=0.75",
        "train.per_device_batch_size=0.75: must be a multiple of 0.5 to give every part of the"
        " mesh whole examples.",
    ),
    "no batch": (
        "train.per_device_batch_size=null",
        "train.per_device_batch_size=null: missing; set it or train.global_batch_size.",
    ),
    "run name": (
        "run.name=a/b",
        "run.name=a/b: must be one folder name; use run.output_dir for a path.",
    ),
    "run name that rings": (
        "run.name='a\ab'",
        "run.name=a\ab: must be one folder name; use run.output_dir for a path.",
    ),
    "run name of a sweep's folder": (
        "run.name=sweeps",
        "run.name=sweeps: must not be launches, snapshots or sweeps, or begin with a dot; sdx.runs"
        " takes that for no run; use another name.",
    ),
    "hidden run name": (
        "run.name=.a",
        "run.name=.a: must not be launches, snapshots or sweeps, or begin with a dot; sdx.runs"
        " takes that for no run; use another name.",
    ),
    "model name": (
        "model.name=../a",
        "model.name=../a: must be one folder name.",
    ),
    "long run name": (
        f"run.name={'a' * 201}",
        f"run.name={'a' * 201}: must be at most 200 bytes long.",
    ),
    "object store": (
        "run.output_dir=hdfs://bucket/runs",
        "run.output_dir=hdfs://bucket/runs: must be a local folder or begin with s3:// or gs://.",
    ),
    "compiled programs in a store": (
        "run.compilation_cache_dir=s3://bucket/xla",
        "run.compilation_cache_dir=s3://bucket/xla: must be a local folder; mount it.",
    ),
    "seed of more than 32 bits": (
        "run.seed=4294967296",
        "run.seed=4294967296: must be at least 0 and at most 4294967295.",
    ),
    "no output folder": ("run.output_dir=''", "run.output_dir='': must be a folder."),
    "no run to fork": (
        "run.resume_from=''",
        "run.resume_from='': must be RUN or RUN@STEP, or null.",
    ),
}
SOUND = [
    "run.output_dir=s3://bucket/runs run.resume_from=gs://bucket/runs/a@best",
    "hardware=gpu_h100_8 mesh.ici.tensor=2 train.per_device_batch_size=0.5",
    "hardware=gpu_h100_8 mesh.ici.data=2 mesh.ici.fsdp=2 mesh.ici.tensor=2",
    "model=sd21 hardware=gpu_h100_8 mesh.ici.data=1 mesh.ici.fsdp=1 mesh.ici.tensor=8"
    " train.global_batch_size=8 attention.shard_sequence=true",
    *(
        f"{hardware} mesh={mesh}"
        for hardware in (TWO_SLICES, "hardware=gpu_h100_8x8", "hardware=tpu")
        for mesh in ("dp", "fsdp", "fsdp_tensor", "hsdp")
    ),
    "hardware=gpu_h100_8x8 mesh=hsdp mesh.dcn.data=2 mesh.dcn.fsdp=4",
    "hardware=gpu_h100_8x8 mesh.dcn.data=4",
    "hardware=gpu mesh=fsdp",
    "hardware=gpu train.global_batch_size=32",
    "lr_schedule=cosine",
    "lr_schedule=cosine lr_schedule.warmup_fraction=0.1",
    "lr_schedule=constant_with_warmup lr_schedule.warmup_steps=null"
    " lr_schedule.warmup_fraction=0.1 lr_schedule.decay_steps=50",
    "train.max_steps=null train.epochs=3",
    "train.per_device_batch_size=8 train.global_batch_size=8",
    "train.global_batch_size=24",
    "checkpoint.every=null sample.every=null",
    "diffusion.timestep_bias.strategy=earlier diffusion.timestep_bias.multiplier=0.5",
    "diffusion.dream=1 diffusion.prediction_type=epsilon",
    "train.text_encoder=true optimizer.text_encoder_lr=1e-6",
    "export.push_to_hub=true export.hub_model_id=me/it",
    "optimizer=lion optimizer.b1=0.95 optimizer.b2=0.98",
    "attention=dot_product attention.split_head_dim=false",
    "model=sd15 hardware=gpu_h100_1 attention=cudnn attention.min_sequence=257",
    "model=sd21 hardware=tpu_v4_8 attention=splash attention.block_sizes.block_q=256",
    "metrics.sinks=[jsonl,wandb] metrics.wandb.entity=flock",
    "model.init=pretrained model.unet_checkpoint=unet",
    "diffusion.class_name=DDIMScheduler",
    "diffusion.prediction_type=epsilon diffusion.rescale_zero_terminal_snr=true"
    " sample.num_steps=499",
    "sampler=euler diffusion.prediction_type=epsilon diffusion.rescale_zero_terminal_snr=true"
    " sample.num_steps=500",
    PHOTOS,
    "eval.every=200 checkpoint.keep_best=2",
    'eval.every=0 data.split="train[:95%]" eval.split="train[95%:]"',
    'eval.every=0 data.split="train[1000:]" eval.split="train[:1000]"',
    "profiler.enabled=true profiler.skip_steps=1 profiler.steps=3 train.max_steps=4",
]


def faults_of(line: str) -> list[str]:
    overrides = line.split(" ")
    config = quick(overrides)
    given = inspect(overrides, [CONF]).keys
    return [str(problem) for problem in [*check(config), *check_given(config, given)]]


@pytest.mark.parametrize("case", RULES)
def test_rule(case: str) -> None:
    line, text = RULES[case]
    assert faults_of(line) == [text]


@pytest.mark.parametrize("line", SOUND)
def test_sound_configurations_pass(line: str) -> None:
    assert faults_of(line) == []


def test_queries_of_every_bucket_must_divide() -> None:
    line = (
        f"{PHOTOS} data.buckets=true model=sd21 data.resolution=256 hardware=gpu_h100_8"
        " mesh.ici.data=1 mesh.ici.fsdp=2 mesh.ici.tensor=4 attention.shard_sequence=true"
    )
    of = "of {} pixels level 3 has {}; use attention.shard_sequence=false."
    odd = {"384x192": 18, "320x192": 15, "192x320": 15, "192x384": 18}  # not 256x256
    for fault, (size, length) in zip(faults_of(line), odd.items(), strict=True):
        assert fault.endswith(of.format(size, length))


def test_faults_of_many_rules_come_together() -> None:
    config = quick(["model=sd21"])
    broken = dataclasses.replace(
        config,
        sample=SampleConfig(num_steps=0, guidance_scale=0.5),
        data=dataclasses.replace(config.data, resolution=500),
    )
    paths = [problem.path for problem in check(broken)]
    assert paths == ["sample.guidance_scale", "sample.num_steps", "data.resolution"]


def test_a_key_is_in_effect_or_named_in_a_fault() -> None:
    config = quick([])
    idle = [path for path in leaves() if not has_effect(config, path)]
    assert "data.dir" in idle and "lr_schedule.power" in idle and "optimizer.lr" not in idle


@pytest.mark.parametrize("extreme", [0, -1, -2, 1, 10**9, float("nan"), float("inf"), None, []])
def test_no_value_makes_the_check_itself_fail(extreme: object) -> None:
    config = quick(["hardware=tpu_v4_32"])
    for path, leaf in leaves().items():
        if (
            type(extreme) is leaf.kind
            or (leaf.kind is float and extreme == 1)
            or (extreme is None and leaf.optional)
        ):
            for problem in check(replaced(config, path, extreme)):
                assert str(problem)


def replaced(node: Any, path: str, value: object) -> Any:
    name, _, rest = path.partition(".")
    value = replaced(getattr(node, name), rest, value) if rest else value
    return dataclasses.replace(node, **{name: value})
