"""The folder of compiled programs, so that a second start compiles nothing.

Of many processes JAX lets the first one alone write there: the others read what it wrote where they
see the folder and, as on TPUs and GPUs, compile the same; on a CPU each one's programs have names
of their own, and the others of a rehearsal compile at every start.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from sdx.parallel.agreement import is_first


def use_compilation_cache(folder: str | None) -> None:
    """Keeps compiled programs in `folder`, however small or quickly made; None switches it off."""
    if folder is None:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextmanager
def heal_compilation_cache(folder: str | None) -> Iterator[None]:
    """Removes entries that JAX found unreadable within, so that the next start replaces them; of
    many processes the first one does, which alone writes them.

    A process killed while it wrote an entry leaves half of it; JAX (0.10 to 0.12) warns, compiles
    and never overwrites a file that is there, so every later start would compile again.
    """
    if not is_first():
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        text = str(warning.message)
        torn = re.search(r"reading persistent compilation cache entry for '([\w.-]+)'", text)
        if torn is None or folder is None:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
            continue
        for entry in Path(folder).expanduser().glob(f"{torn[1]}-*"):
            entry.unlink(missing_ok=True)
