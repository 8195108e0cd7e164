"""An NVIDIA GPU as text for XLA, which compiles for it without having it.

The text is XLA's GpuTargetConfigProto (openxla/xla, stream_executor/device_description.proto).
Numbers by compute capability: CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability". By device: NVIDIA's H100, H200 and A100 data sheets and architecture white papers.
They decide whether a program compiles, how it is split and how much memory it takes; speeds are not
concluded from them.
"""

from dataclasses import dataclass

from sdx.config.errors import any_of
from sdx.config.schema import HardwareConfig
from sdx.planning.compiled import GIB


class TopologyError(ValueError):
    """The compiler cannot describe the hardware, or describes something else than the preset."""


@dataclass(frozen=True)
class _Gpu:
    compute_capability: tuple[int, int]
    num_cores: int
    """Streaming multiprocessors."""
    l2_bytes: int
    clock_ghz: float
    """Boost."""
    core_shared_bytes: int
    """Shared memory of a multiprocessor; a block may have all but 1 KiB."""
    core_fpus: int
    """Single-precision units of a multiprocessor."""


_H100 = _Gpu((9, 0), 132, 50 * 2**20, 1.98, 228 * 1024, 128)
GPUS = {
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H200": _H100,  # the same chip with other memory
    "NVIDIA A100-SXM4-80GB": _Gpu((8, 0), 108, 40 * 2**20, 1.41, 164 * 1024, 64),
}


def gpu_target(hardware: HardwareConfig) -> str:
    """The text for one GPU of `hardware`; raises TopologyError for one that is not known here."""
    gpu = GPUS.get(hardware.device_kind or "")
    if gpu is None or hardware.hbm_gib is None or hardware.hbm_gbps is None:
        raise TopologyError(
            f"hardware.device_kind={hardware.device_kind}: compiling ahead needs a GPU that is "
            "described here, with hbm_gib and hbm_gbps; allowed: " + any_of(GPUS) + "."
        )
    major, minor = gpu.compute_capability
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_block_optin: {gpu.core_shared_bytes - 1024}
  shared_memory_per_core: {gpu.core_shared_bytes}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: {gpu.num_cores}
  fpus_per_core: {gpu.core_fpus}
  clock_rate_ghz: {gpu.clock_ghz}
  l2_cache_size: {gpu.l2_bytes}
  memory_bandwidth: {int(hardware.hbm_gbps * 1e9)}
  device_memory_size: {int(hardware.hbm_gib * GIB)}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 13 }}
device_description_str: "{hardware.device_kind}"
"""
