"""Stopping: real signals at a real process, also while its main thread is inside C code."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# Each script prints `ready` when it is where the signal should find it.
_START = """
import signal, sys, time
from sdx.parallel.stopping import StopFlag
def on_exit():
    print("ended early", flush=True)
"""
_POLLING = (
    _START
    + """
with StopFlag(on_exit) as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("saving after", stop.signal_name, flush=True)
    if "slow" in sys.argv:
        time.sleep(600)
"""
)
_IN_C = (
    _START
    + """
import hashlib
with StopFlag(on_exit) as stop, stop.compiling():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 1_000_000_000)
"""
)
_IN_XLA = (
    _START
    + """
import jax, jax.numpy as jnp
jax.config.update("jax_enable_compilation_cache", False)
def program(x):
    for i in range(2000):
        x = jnp.sin(x) @ x + i
    return x
lowered = jax.jit(program).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32))
with StopFlag(on_exit) as stop, stop.compiling():
    print("ready", flush=True)
    lowered.compile()
    print("compiled", flush=True)
"""
)


def _begin(script: str, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},  # libtpu would speak first
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "ready\n", line + process.stdout.read()
    return process


def _end(process: subprocess.Popen[str]) -> tuple[int, str]:
    assert process.stdout is not None
    timer = threading.Timer(300, process.kill)
    timer.start()
    with process:
        output = process.stdout.read()
    timer.cancel()
    return process.returncode, output


@pytest.mark.fast
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_sets_the_flag_and_the_process_goes_on(number: signal.Signals) -> None:
    process = _begin(_POLLING)
    process.send_signal(number)
    assert _end(process) == (0, f"saving after {number.name}\n")


@pytest.mark.fast
def test_a_second_interrupt_ends_at_once_but_a_second_term_does_not() -> None:
    process = _begin(_POLLING, "slow")
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving after SIGTERM\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert _end(process) == (75, "ended early\n")


@pytest.mark.parametrize("script", [_IN_C, _IN_XLA], ids=["pbkdf2", "xla"])
def test_while_compiling_a_signal_ends_the_process_at_once(script: str) -> None:
    process = _begin(script)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert _end(process) == (75, "ended early\n"), "without the end of what it was in"


@pytest.mark.fast
def test_a_signal_before_compiling_is_not_forgotten() -> None:
    script = """
with StopFlag(on_exit) as stop:
    signal.raise_signal(signal.SIGTERM)
    while not stop.requested:
        time.sleep(0.01)
    print("ready", flush=True)
    with stop.compiling():
        print("compiling", flush=True)
"""
    assert _end(_begin(_START + script)) == (75, "ended early\n")


@pytest.mark.fast
def test_a_hanging_farewell_does_not_keep_the_process() -> None:
    script = """
import sdx.parallel.stopping as stopping
stopping._ON_EXIT_TIMEOUT_S = 0.2
with StopFlag(lambda: time.sleep(600)) as stop, stop.compiling():
    print("ready", flush=True)
    time.sleep(600)
"""
    process = _begin(_START + script)
    process.send_signal(signal.SIGTERM)
    assert _end(process) == (75, "")


@pytest.mark.fast
def test_a_forked_worker_dies_of_its_own_signal_and_leaves_the_parent_alone() -> None:
    script = """
import os, warnings
warnings.simplefilter("ignore")  # of forking beside threads
with StopFlag(on_exit) as stop:
    child = os.fork()
    if child == 0:
        time.sleep(3)
        os._exit(0)
    print("ready", flush=True)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    _, how = os.waitpid(child, 0)
    time.sleep(0.2)
    print(os.WIFSIGNALED(how), os.WTERMSIG(how) == signal.SIGTERM, stop.requested, flush=True)
"""
    assert _end(_begin(_START + script)) == (0, "True True False\n")


@pytest.mark.fast
def test_handlers_are_put_back() -> None:
    script = """
print("ready", flush=True)
before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)]
with StopFlag(on_exit):
    pass
with StopFlag(on_exit):
    pass
after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)]
print(before == after, signal.set_wakeup_fd(-1))
"""
    assert _end(_begin(_START + script)) == (0, "True -1\n")
