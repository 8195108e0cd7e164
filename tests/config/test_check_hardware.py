"""Rules of hardware.* and xla.*: every fault is told in words, and what is sound passes."""

import pytest

from tests.config.test_check import faults_of

pytestmark = pytest.mark.fast

GPU_FLAG = "--xla_gpu_autotune_level=0"
TPU_FLAG = "--xla_tpu_rwb_fusion=false"

RULES = {
    "hosts with as many devices each": (
        "hardware=tpu_v4_32 hardware.num_hosts=3",
        "hardware.num_devices=16: must be a multiple of hardware.num_hosts=3.",
    ),
    "slices of whole hosts": (
        "hardware=tpu_v4_32x2 hardware.num_slices=16",
        "hardware.num_hosts=8: must be a multiple of hardware.num_slices=16, each has whole hosts.",
    ),
    "slices of GPUs": (
        "hardware=gpu_h100_8x8 hardware.num_slices=2",
        "hardware.num_slices=2: is of TPUs, hardware=gpu_h100_8x8 is gpu; use num_hosts.",
    ),
    "topology of GPUs": (
        "hardware=gpu_h100_8 hardware.topology=v4:2x2x4",
        "hardware.topology=v4:2x2x4: is of TPUs, hardware=gpu_h100_8 is gpu; leave it out.",
    ),
    "topology by the cloud's name": (
        "hardware=tpu_v4_32 hardware.topology=v4-32",
        "hardware.topology=v4-32: must be a generation and the chips in each dimension; v4:2x2x4 or"
        " v5e:4x8, for instance.",
    ),
    "hosts that do not tile a slice": (
        "hardware=tpu_v4_32 hardware.chips_per_host=[2,2,3]",
        "hardware.chips_per_host=[2,2,3]: must be three numbers that divide those of"
        " hardware.topology=v4:2x2x4; a missing third one is 1: [2,4,1] for v5e:2x4.",
    ),
    "hosts of a topology that is not given": (
        "hardware=tpu hardware.chips_per_host=[2,2,1]",
        "hardware.chips_per_host=[2,2,1]: has no effect here; it needs hardware.topology.",
    ),
    "chips of a topology that is not given": (
        "hardware=tpu hardware.chip_config=megacore",
        "hardware.chip_config=megacore: has no effect here; it needs hardware.topology.",
    ),
    "a process without its number": (
        "hardware.num_devices=2 mesh=dp distributed.coordinator_address=h:1"
        " distributed.num_processes=2",
        "distributed.process_id=null: missing, a process needs its number and theirs; or leave all"
        " three out where SLURM or a TPU knows them.",
    ),
    "a number above theirs": (
        "hardware.num_devices=2 mesh=dp distributed.coordinator_address=h:1"
        " distributed.num_processes=2 distributed.process_id=2",
        "distributed.process_id=2: must be below distributed.num_processes=2, they are numbered"
        " from 0.",
    ),
    "an address without a port": (
        "distributed.coordinator_address=host",
        "distributed.coordinator_address=host: must be HOST:PORT of process 0, as every host"
        " reaches it.",
    ),
    "a rehearsal of an unknown number": (
        "hardware=tpu hardware.simulate=true train.global_batch_size=4",
        "hardware.simulate=true: hardware=tpu does not say how many devices to stand for; give"
        " hardware.num_devices, or a preset such as hardware=tpu_v4_32.",
    ),
    "flag without a value": (
        "hardware=gpu xla.flags=['--xla_gpu_deterministic_ops']",
        "xla.flags=--xla_gpu_deterministic_ops: must be --NAME=VALUE, without spaces.",
    ),
    "flag with one dash": (
        f'hardware=tpu xla.libtpu_args=["{TPU_FLAG[1:]}"]',
        f"xla.libtpu_args={TPU_FLAG[1:]}: must be --NAME=VALUE, without spaces.",
    ),
    "flag named twice": (
        f'hardware=gpu xla.flags=["{GPU_FLAG}","--xla_gpu_autotune_level=1"]',
        f"xla.flags=--xla_gpu_autotune_level=1: named twice, {GPU_FLAG} is there too; give one.",
    ),
    "flag of libtpu": (
        f'hardware=tpu xla.flags=["{TPU_FLAG}"]',
        f"xla.flags={TPU_FLAG}: is a flag of libtpu; put it into xla.libtpu_args.",
    ),
    "flag for GPUs on a TPU": (
        f'hardware=tpu xla.flags=["{GPU_FLAG}"]',
        f"xla.flags={GPU_FLAG}: is a flag for GPUs, hardware=tpu is tpu;"
        " use xla=none, or a set for it.",
    ),
    "flags for TPUs on a GPU": (
        "hardware=gpu xla=tpu_multislice",
        "xla.libtpu_args=[--xla_tpu_enable_data_parallel_all_reduce_opt=true, …]: are flags for"
        " TPUs, hardware=gpu is gpu; use xla=none, or a set for it.",
    ),
    "memory of a TPU": (
        "hardware=tpu xla.memory_fraction=0.5",
        "xla.memory_fraction=0.5: has no effect here; it needs GPUs, and hardware.simulate=false.",
    ),
    "memory of the whole GPU and more": (
        "hardware=gpu xla.memory_fraction=1.5",
        "xla.memory_fraction=1.5: must be above 0 and at most 1.",
    ),
}
SOUND = [
    "hardware=tpu_v5e_8 hardware.chips_per_host=[2,2,1] hardware.num_hosts=2",
    "hardware=tpu_v4_128 hardware.topology=v4:4x4x4",
    "hardware=gpu_h100_8 xla=gpu_deterministic xla.memory_fraction=1",
    f'hardware=tpu_v5p_8 xla.libtpu_args=["{TPU_FLAG}"]',
    "hardware=tpu_v5p_8 xla.flags=['--xla_dump_to=dump']",
    "xla.flags=['--xla_cpu_enable_fast_math=false']",
]


@pytest.mark.parametrize("case", RULES)
def test_rule(case: str) -> None:
    line, text = RULES[case]
    assert faults_of(line) == [text]


@pytest.mark.parametrize("line", SOUND)
def test_sound_configurations_pass(line: str) -> None:
    assert faults_of(line) == []
