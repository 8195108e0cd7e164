"""What XLA held for programs that were compiled for described TPUs: the yardstick of the estimate.

November 2026, jax 0.10.2, libtpu 0.0.42.1; arguments and temporaries of one device from
`compiled.memory_analysis()`. The coefficients in planning/temporaries.py were fitted by hand to
`FITTED`, and are judged on `JUDGED`, which had no part in it. Where weights are spread over fsdp it
was with the flags of `xla=tpu`; without them `MIXED` was.
"""

from typing import NamedTuple


class Point(NamedTuple):
    """One program of one configuration, compiled."""

    overrides: str
    program: str
    level: str
    arguments: int
    temporaries: int


MIB = 2**20
SD21 = "model=sd21 train.ema=false hardware=tpu_v4_8 mesh=dp model.unet.layers_per_block=1"
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


def unet(*levels: tuple[int, str]) -> str:
    """Levels of a UNet, each with its channels and its kind, heads of 64."""
    channels, kinds = zip(*levels, strict=True)
    heads = [width // 64 for width in channels]
    return (
        f"model.unet.block_out_channels={[*channels]} model.unet.attention_head_dim={heads} "
        f"model.unet.down_block_types=[{','.join(kinds)}]"
    ).replace(", ", ",")


HALF, WHOLE = "data.resolution=512", "data.resolution=768"
BY_1, BY_2, BY_4 = (f"train.per_device_batch_size={number}" for number in (1, 2, 4))
ONE = f"{SD21} {unet((320, CROSS))}"
TWO = f"{SD21} {unet((320, CROSS), (640, CROSS))}"
MIXED = f"{SD21} {unet((320, CROSS), (1280, PLAIN))}"

POKEMON = "model=sd21 data=pokemon"
SMALL = f"{POKEMON} {unet((320, CROSS), (640, PLAIN))} model.unet.layers_per_block=1"
CACHED = "data.cache=moments_and_context"

FITTED = (
    Point(f"{ONE} {HALF} {BY_1}", "step", "O0", 343798272, 724187648),
    Point(f"{ONE} {HALF} {BY_4}", "step", "O0", 345530880, 3180722688),
    Point(f"{ONE} {HALF} {BY_4}", "step", "default", 345530880, 3027435008),
    Point(f"{ONE} {HALF} {BY_4} train.remat=blocks", "step", "O0", 345530880, 1017208832),
    Point(f"{ONE} {HALF} {BY_4} train.remat=dots", "step", "O0", 345530880, 1366262272),
    Point(f"{ONE} {HALF} {BY_4} attention=dot_product", "step", "O0", 345530880, 10570443776),
    Point(f"{TWO} {HALF} {BY_4}", "step", "O0", 1333191168, 3803719168),
    Point(f"{TWO} {WHOLE} {BY_2}", "step", "O0", 1332298240, 4223041536),
    Point(f"{MIXED} data.resolution=256 {BY_1}", "step", "O0", 2926838272, 801011200),
    Point(f"{MIXED} mesh=fsdp data.resolution=256 {BY_1}", "step", "O0", 740925952, 369829888),
    Point(f"{POKEMON} hardware=tpu_v4_32 train.remat=blocks", "step", "O0", 888774656, 3859031040),
    Point(f"{SMALL} hardware=tpu_v4_8 {HALF}", "encode", "O0", 378731520, 2554041856),
)

JUDGED = (
    Point(f"{POKEMON} hardware=tpu_v4_32", "step", "O0", 888774656, 14023098880),
    Point(f"{POKEMON} hardware=tpu_v4_32", "encode", "O0", 102042624, 5709579264),
    Point(f"{SMALL} hardware=tpu_v4_8 {HALF}", "step", "O0", 337908736, 3088401408),
    Point(
        f"{SMALL} hardware=tpu_v4_8 {HALF} train.remat=blocks", "step", "O0", 337908736, 1033289216
    ),
    Point(
        f"{SMALL} hardware=tpu_v4_8 {HALF} {CACHED} train.per_device_batch_size=8",
        "step",
        "O0",
        340218880,
        4839505920,
    ),
    Point(f"{SMALL} hardware=tpu_v4_8 {CACHED}", "step", "O0", 338433024, 6806492672),
    Point(f"{SMALL} hardware=tpu_v5e_8 {HALF} {CACHED}", "step", "O0", 171201536, 2941858304),
    Point(
        f"{POKEMON} {unet((320, CROSS))} model.unet.layers_per_block=1 hardware=tpu_v5e_8 {HALF} "
        f"{CACHED} {BY_4}",
        "step",
        "O0",
        63443968,
        2969235456,
    ),
    Point(f"{TWO} {HALF} {BY_4} train.remat=dots", "step", "O0", 1333191168, 1762099200),
    Point(f"{TWO} {HALF} {BY_4} train.remat=full", "step", "O0", 1333191168, 1265949184),
    Point(f"{MIXED} mesh=fsdp {HALF} {BY_4}", "step", "O0", 742789632, 3774396416),
    Point(
        f"{ONE} {HALF} {BY_2} train.gradient_accumulation=2", "step", "O0", 345530880, 1890192384
    ),
    Point(
        f"{ONE} {HALF} {BY_2} attention=dot_product train.remat=blocks",
        "step",
        "O0",
        344375808,
        1535981056,
    ),
)
