"""The programs of a run are compiled for chips that are not here, and every way that can end is an
answer."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src import compiler as jax_compiler
from jax._src import config as jax_config
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from sdx.config.compose import to_yaml
from sdx.config.schema import AttentionKind, Config, HardwareConfig, MeshAxes, Platform, XlaConfig
from sdx.parallel import sharding
from sdx.planning import compiled, compiler, compiling
from sdx.planning.compiled import (
    CompilationFailed,
    CompilationRefused,
    CompiledProgram,
    CompiledReport,
    Overflow,
    ProgramBytes,
    compile_program,
    from_json,
    to_json,
)
from sdx.planning.compiler import LEVELS, compile_here, compile_lowered, overflow
from sdx.planning.topology import ENVIRONMENT, described_devices, has_compiler
from tests.conftest import require
from tests.micro import micro_config

GIB = 2**30
V5E = HardwareConfig(
    name="v5e_4",
    platform=Platform.tpu,
    device_kind="TPU v5 lite",
    num_devices=4,
    topology="v5e:2x2",
)
TWO_SLICES = HardwareConfig(
    name="v4_8x2",
    platform=Platform.tpu,
    device_kind="TPU v4",
    num_devices=8,
    num_hosts=2,
    num_slices=2,
    topology="v4:2x2x1",
    chip_config="megacore",
)


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """As in the process that compiles; nothing of it outlasts these tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def on(hardware: HardwareConfig) -> Config:
    """The micro-model with its state spread over a slice, copied over slices."""
    config = micro_config(global_batch_size=16)
    config.hardware, config.mesh.ici, config.xla = hardware, MeshAxes(data=1, fsdp=-1), XlaConfig()
    config.mesh.dcn.data = hardware.num_slices
    return config


@pytest.fixture(scope="module")
def for_v5e() -> CompiledReport:
    """By a process of its own, as sdx.plan does."""
    require(has_compiler(Platform.tpu), "libtpu")
    return compile_program(on(V5E))


@pytest.fixture(scope="module")
def for_two_slices() -> CompiledReport:
    """In this process, with arrays that the micro-model's size would leave whole."""
    require(has_compiler(Platform.tpu), "libtpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "SMALLEST_SHARDED_BYTES", 256)
        return compile_here(on(TWO_SLICES), "O0")


def test_bytes_of_the_state_are_donated(for_v5e: CompiledReport) -> None:
    encode, step = (for_v5e.programs[name] for name in ("encode", "step"))
    assert encode.bytes is not None and step.bytes is not None
    assert step.donated and step.bytes.outputs >= step.bytes.aliased > 0.99 * step.bytes.outputs
    assert encode.bytes.aliased == 0 and not encode.donated
    assert step.bytes.peak > step.bytes.arguments > step.bytes.outputs
    assert min(step.bytes.temporaries, step.bytes.code, encode.bytes.temporaries) > 0
    assert step.flops is not None and encode.flops is not None and step.flops > encode.flops > 0


def test_report_of_a_process(for_v5e: CompiledReport) -> None:
    assert for_v5e.is_compiled and for_v5e.level == "O0" and for_v5e.notes == []
    assert for_v5e.versions.keys() >= {"jax", "jaxlib", "libtpu"}
    assert 0 < for_v5e.compile_s < 600 and for_v5e.lower_s > 0
    assert GIB / 2 < for_v5e.host_peak_bytes < 4 * GIB
    assert for_v5e.available_bytes is None and for_v5e.fits(16 * GIB) is True
    assert for_v5e.fits(2**20) is False
    assert from_json(to_json(for_v5e)) == for_v5e


def test_slices_talk_over_the_network_between_them(for_two_slices: CompiledReport) -> None:
    step = for_two_slices.programs["step"]
    found = step.collectives
    assert found["send"] == found["recv"] and found["send"].count > 5
    assert found["all_gather"].count > 5 and found["all_reduce"].bytes > 0
    assert step.donated


def test_one_slice_has_no_such_network(for_v5e: CompiledReport) -> None:
    assert not {"send", "recv"} & for_v5e.programs["step"].collectives.keys()


def test_the_level_is_of_one_compilation() -> None:
    assert {jax.config.values["jax_optimization_level"]} == {"UNKNOWN"}
    # jax 0.12 keeps the enumeration elsewhere, under another name, than 0.10 does
    levels = vars(jax_compiler).get("CompilerEffortLevel") or vars(jax_config)["EffortLevel"]
    assert {level: levels(level).value for level in LEVELS if level != "default"} == {
        level: value for level, value in LEVELS.items() if level != "default"
    }
    assert LEVELS["default"] == levels.UNKNOWN.value


def test_too_large_is_an_answer() -> None:
    require(has_compiler(Platform.tpu), "libtpu")
    place = SingleDeviceSharding(described_devices(V5E)[0])
    x = jax.ShapeDtypeStruct((50_000, 50_000), jnp.float32, sharding=place)
    found = compile_lowered(jax.jit(lambda x: (x @ x) @ x + x.T).lower(x), "O0")
    assert found.bytes is None and found.overflow is not None
    assert found.overflow.has == int(15.75 * GIB)
    assert found.overflow.needs == pytest.approx(3 * 4 * 50_000**2, rel=0.01)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("message", "answer"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (16.14G) exceeds available HBM (15.75G).",
            Overflow(int(16.14 * GIB), int(15.75 * GIB)),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space"
            " hbm. Used 1.02T of 30.75G hbm. Exceeded hbm capacity by 1013.73G.",
            Overflow(int(1.02 * 2**40), int(30.75 * GIB)),
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M vmem.", None),
        ("INTERNAL: Mosaic failed to compile TPU kernel", None),
    ],
)
def test_what_a_compiler_says_of_memory(message: str, answer: Overflow | None) -> None:
    assert overflow(message) == answer


def program(arguments: int, temporaries: int, needs: int | None = None) -> CompiledProgram:
    held = ProgramBytes(arguments, 10, 5, temporaries, peak=0, code=3)
    too_large = None if needs is None else Overflow(needs, 500)
    return CompiledProgram(None if needs else held, too_large, None, {}, None)


@pytest.mark.fast
def test_what_the_other_program_needs_lies_beside() -> None:
    report = CompiledReport({}, "O0", {}, 0.0, 0, is_compiled=True, notes=[])
    encode, step = program(100, 400), program(300, 40)
    assert replace(report, programs={"encode": encode, "step": step}).needed_bytes == 508 + 300
    encode, step = program(100, 4), program(300, 400)
    found = replace(report, programs={"encode": encode, "step": step})
    assert found.needed_bytes == 708 + 100
    assert (found.fits(808), found.fits(807)) == (True, False)
    found = replace(report, programs={"encode": encode, "step": program(0, 0, needs=700)})
    assert (found.needed_bytes, found.available_bytes) == (800, 500)
    assert found.fits(10**6) is False
    assert replace(found, is_compiled=False).fits(10**6) is None


@pytest.mark.fast
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("kill -9 $$", r"killed by signal 9 after .* Linux does that when memory runs out"),
        (
            "echo noise; echo Boom >&2; exit 3",
            r"exit code 3 after [\s\S]*last words:[\s\S]*  Boom$",
        ),
    ],
)
def test_a_compiler_that_dies(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = tmp_path / "python"
    dying.write_text(f"#!/bin/sh\n{script}\n")
    dying.chmod(0o755)
    monkeypatch.setattr(compiled.sys, "executable", str(dying))
    with pytest.raises(CompilationFailed, match=said):
        compile_program(on(V5E))


@pytest.mark.fast
def test_what_the_process_refuses_is_told_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on(replace(V5E, topology=None))
    saved, result = tmp_path / "config.yaml", tmp_path / "result"
    saved.write_text(to_yaml(config))
    assert compiling.main([str(saved), str(result), "O0"]) == compiling.REFUSED
    said = result.read_text()
    assert said.startswith("hardware.topology: missing, hardware=v5e_4")
    refusing = tmp_path / "python"
    refusing.write_text(f'#!/bin/sh\ncp {result} "$4"\nexit 2\n')
    refusing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(refusing))
    with pytest.raises(CompilationRefused) as error:
        compile_program(config)
    assert str(error.value) == said


def test_gpus_without_their_compiler_are_lowered_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "has_compiler", lambda platform: False)
    gpus = HardwareConfig(name="gpus", platform=Platform.gpu, num_devices=8)
    config = on(gpus)
    config.attention.kind = AttentionKind.cudnn
    found = compile_here(config, "O0")
    assert not found.is_compiled and found.needed_bytes is None and found.fits(GIB) is None
    assert found.notes[0].startswith("lowered, not compiled: JAX's CUDA plugin is not installed")
    assert found.programs["step"].collectives == {} and found.compile_s == 0
