"""Flags reach the environment before JAX, a person's own win, and no unknown one gets there."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from sdx import encode, train
from sdx.config.errors import ConfigError
from sdx.config.folders import CONF
from sdx.config.schema import Config, HardwareConfig, Platform, XlaConfig
from sdx.parallel import flag_probe, xla_flags
from sdx.parallel.flag_probe import JAXLIB, LIBTPU, BadFlag, Compiler, ProbeFailed, bad_flags
from sdx.parallel.xla_flags import FRACTION, OLD_FRACTION, VARIABLES, flags_in_force, set_flags
from tests.config.quick import quick
from tests.conftest import require

FAST, SLOW = "--xla_cpu_enable_fast_math=true", "--xla_cpu_enable_fast_math=false"
FUSION = "--xla_tpu_rwb_fusion=false"
CPU, GPU, TPU = (HardwareConfig(name="it", platform=platform) for platform in Platform)
SETS = {
    file.stem: yaml.safe_load(file.read_text()) for file in sorted((CONF / "xla").glob("*.yaml"))
}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process that has neither JAX nor flags yet."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(xla_flags, "_found", {})
    monkeypatch.setattr(xla_flags, "_in_force", {})
    monkeypatch.delitem(sys.modules, "jax")
    yield monkeypatch


@pytest.fixture
def trusting(fresh: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As `fresh`, and every flag is taken for good."""
    fresh.setattr(xla_flags, "bad_flags", lambda *_: [])
    return fresh


def told(hardware: HardwareConfig, xla: XlaConfig) -> list[str]:
    said: list[str] = []
    set_flags(xla, hardware, None, said.append)
    return said


@pytest.mark.fast
def test_flags_of_each_kind_have_their_variable(trusting: pytest.MonkeyPatch) -> None:
    assert told(TPU, XlaConfig([FAST], [FUSION])) == []
    assert flags_in_force() == {"XLA_FLAGS": FAST, "LIBTPU_INIT_ARGS": FUSION}


@pytest.mark.fast
def test_memory_is_shared_out_on_gpus_alone(trusting: pytest.MonkeyPatch) -> None:
    assert told(CPU, XlaConfig(memory_fraction=0.5)) == []
    assert flags_in_force() == {}
    told(GPU, XlaConfig(memory_fraction=0.5))
    assert flags_in_force() == {FRACTION: "0.5"}


@pytest.mark.fast
def test_what_the_environment_names_too_gives_way_and_is_told(
    trusting: pytest.MonkeyPatch,
) -> None:
    trusting.setenv("XLA_FLAGS", f"  {SLOW} --xla_dump_to='a b'")
    trusting.setenv(OLD_FRACTION, "0.3")
    xla = XlaConfig([FAST, "--xla_dump_to=a b", "--xla_dump_hlo_as_text=true"], memory_fraction=0.5)
    assert told(GPU, xla) == [
        f"xla.flags: {FAST} gives way to {SLOW} in XLA_FLAGS",
        f"xla.memory_fraction: 0.5 gives way to {OLD_FRACTION}=0.3",
    ]
    assert flags_in_force() == {
        "XLA_FLAGS": f"--xla_dump_hlo_as_text=true   {SLOW} --xla_dump_to='a b'",
        OLD_FRACTION: "0.3",
    }


@pytest.mark.fast
def test_flags_in_a_file_of_the_environment_stay(
    trusting: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "flags"
    file.write_text(f"{SLOW}\n")
    trusting.setenv("XLA_FLAGS", str(file))
    told(CPU, XlaConfig())
    assert flags_in_force() == {"XLA_FLAGS": str(file)}
    told(CPU, XlaConfig(["--xla_dump_hlo_as_text=true"]))
    assert os.environ["XLA_FLAGS"].split() == ["--xla_dump_hlo_as_text=true", SLOW]


@pytest.mark.fast
def test_a_rehearsal_leaves_out_the_flags_of_chips_it_stands_for(
    trusting: pytest.MonkeyPatch,
) -> None:
    for platform in (Platform.tpu, Platform.gpu):
        rehearsal = HardwareConfig(name="it", platform=platform, simulate=True)
        xla = XlaConfig([FAST, "--xla_gpu_autotune_level=0"], [FUSION], 0.5)
        [line] = told(rehearsal, xla)
        assert "left out" in line
        assert flags_in_force() == {"XLA_FLAGS": FAST}
        assert told(rehearsal, XlaConfig([FAST])) == []


@pytest.mark.fast
def test_other_flags_after_jax_are_refused_and_the_same_pass(trusting: pytest.MonkeyPatch) -> None:
    trusting.setenv("XLA_FLAGS", SLOW)
    told(TPU, XlaConfig(libtpu_args=[FUSION]))
    trusting.setitem(sys.modules, "jax", sys)
    os.environ["LIBTPU_INIT_ARGS"] += " --xla_tpu_use_enhanced_launch_barrier=true"  # as JAX does
    told(TPU, XlaConfig(libtpu_args=[FUSION]))
    for other in (XlaConfig([FAST.replace("fast", "slow")], [FUSION]), XlaConfig()):
        with pytest.raises(ConfigError, match="JAX has started in this process with other flags"):
            told(TPU, other)


@pytest.mark.fast
def test_a_start_without_flags_tries_none(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("XLA_FLAGS", "--xla_nonsense=1")  # the person's own, as they want it
    fresh.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    told(TPU, XlaConfig())
    assert flags_in_force() == {"XLA_FLAGS": "--xla_nonsense=1"}


@pytest.mark.parametrize("name", [name for name, flags in SETS.items() if flags.get("flags")])
def test_jaxlib_knows_the_flags_of_every_set(name: str, tmp_path: Path) -> None:
    assert bad_flags(JAXLIB, " ".join(SETS[name]["flags"]), tmp_path) == []


@pytest.mark.parametrize("name", [name for name, flags in SETS.items() if "libtpu_args" in flags])
def test_libtpu_knows_the_flags_of_every_set(name: str, tmp_path: Path) -> None:
    require(LIBTPU.version is not None, "libtpu")
    assert bad_flags(LIBTPU, " ".join(SETS[name]["libtpu_args"]), tmp_path) == []


@pytest.mark.parametrize(
    ("compiler", "known"),
    [(JAXLIB, "--xla_cpu_enable_fast_math"), (LIBTPU, "--xla_tpu_rwb_fusion")],
    ids=lambda value: getattr(value, "package", ""),
)
def test_unknown_flags_are_found_with_what_was_meant(
    compiler: Compiler, known: str, tmp_path: Path
) -> None:
    require(compiler.version is not None, compiler.package)
    misspelled, alien = f"{known[:-1]}_=true", "--qqqqqqqq=1"
    assert bad_flags(compiler, f"{misspelled} {known}=true {alien}", tmp_path) == [
        BadFlag(misspelled, is_known=False, meant=known),
        BadFlag(alien, is_known=False),
    ]
    assert bad_flags(compiler, f"{known}=perhaps", tmp_path) == [
        BadFlag(f"{known}=perhaps", is_known=True)
    ]
    assert not list(tmp_path.iterdir())


def test_good_flags_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    assert bad_flags(JAXLIB, FAST, cache) == []
    monkeypatch.setattr(flag_probe, "_said", lambda *_: "no compiler there")
    assert bad_flags(JAXLIB, FAST, cache) == []
    with pytest.raises(ProbeFailed, match="jaxlib ended with: no compiler there"):
        bad_flags(JAXLIB, SLOW, cache)
    monkeypatch.setattr(Compiler, "version", "another")
    with pytest.raises(ProbeFailed):
        bad_flags(JAXLIB, FAST, cache)


@pytest.mark.fast
def test_a_probe_that_fails_stops_nobody(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(flag_probe, "_said", lambda *_: "no compiler there")
    said: list[str] = []
    set_flags(XlaConfig([FAST]), CPU, str(tmp_path), said.append)
    assert said == [
        "xla.flags: could not be tried before the start (jaxlib ended with: no compiler there)"
    ]
    assert flags_in_force() == {"XLA_FLAGS": FAST}


def test_the_command_refuses_unknown_flags_and_says_whose_they_are(
    fresh: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fresh.setenv("XLA_FLAGS", "--xla_theirs_alone=2")
    places = [f"run.output_dir={tmp_path}/runs", f"run.compilation_cache_dir={tmp_path}/cache"]
    assert train.main([*places, "xla.flags=['--xla_ours_alone=1']"]) == 2
    written = capfd.readouterr().err
    version = JAXLIB.version
    assert f"\n  xla.flags=--xla_ours_alone=1: unknown to jaxlib {version}; leave it " in written
    assert f"\n  XLA_FLAGS=--xla_theirs_alone=2: unknown to jaxlib {version}; leave" in written
    assert not (tmp_path / "runs").exists()


class Package(ModuleType):
    """What a command imports its body from; that imports JAX."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        assert flags_in_force() == {"XLA_FLAGS": FAST}
        return SimpleNamespace(run=lambda *_: 7, encode=lambda *_: 7)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("command", "package"),
    [(train.train, "sdx.experiment"), (encode.encode, "sdx.experiment.encoding")],
)
def test_commands_set_flags_before_they_import_jax(
    command: Callable[[Config, list[str]], int], package: str, trusting: pytest.MonkeyPatch
) -> None:
    trusting.setitem(sys.modules, package, Package(package))
    assert command(quick([f"xla.flags=['{FAST}']"]), []) == 7
