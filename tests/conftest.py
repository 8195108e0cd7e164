"""Strict mode: types and shapes checked, promotions refused, eight CPU devices, one compile cache.

The settings are made before any sdx module is imported. They are of this process only: subprocesses
that tests start run sdx as a user would.
"""

import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

from tests.object_store import make_bucket, s3_server

# A shell starts what it sends to the background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]
CHECKED_PACKAGES = [
    "data", "diffusion", "models", "parallel", "sampling", "scores", "training", "weights"
]  # fmt: skip

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(REPOSITORY / ".pytest_cache" / "xla")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
# config is left out: OmegaConf reads its dataclasses while group fields still hold "???".
install_import_hook([f"sdx.{name}" for name in CHECKED_PACKAGES], "beartype.beartype")


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """Where an S3 server of this process answers."""
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket, with credentials in the environment."""
    return make_bucket(s3_address, monkeypatch)


@pytest.fixture
def repository() -> Path:
    """Root of the checkout under test."""
    return REPOSITORY


CACHE_SETTINGS = [
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
]


@pytest.fixture(autouse=True)
def keep_compilation_cache() -> Iterator[None]:
    """A run that a test starts in this process sets the cache of the process; it is set back."""
    before = {name: jax.config.values[name] for name in CACHE_SETTINGS}
    yield
    for name, value in before.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)


def require(found: bool, what: str) -> None:
    """Skips the test where `what` is missing; fails it where CI promised that nothing is."""
    if not found and os.environ.get("SDX_REQUIRE_ALL") == "1":
        pytest.fail(f"{what} is missing, and SDX_REQUIRE_ALL=1 says it must be there")
    if not found:
        pytest.skip(f"{what} is missing")


@pytest.hookimpl(hookwrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Prints the ledger: seconds spent per test folder, so that budgets stay visible."""
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[str(Path(report.nodeid.split("::")[0]).parent)] += report.duration
    terminalreporter.section("ledger")
    for folder, spent in sorted(seconds.items(), key=lambda row: -row[1]):
        terminalreporter.write_line(f"{spent:8.1f} s  {folder}")
    yield
