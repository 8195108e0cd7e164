"""What a sweep says to the person who typed it, who may have gone: jobs matter more than words."""

import os
import sys
from contextlib import suppress
from typing import TextIO


def say(text: str, *, aside: bool = False, end: str = "\n") -> None:
    """A line on standard output, or `aside` on standard error. Where nobody listens any more
    (`| head`, `| tee` after Ctrl-C, a terminal that hung up) it goes on without words, and without
    the letters that a terminal lacks."""
    out = sys.stderr if aside else sys.stdout
    try:
        print(text, file=out, end=end, flush=True)
    except UnicodeEncodeError:
        say(text.encode("ascii", "replace").decode(), aside=aside, end=end)
    except (OSError, ValueError):  # ValueError: it is closed
        mute(out)


def mute(out: TextIO) -> None:
    """Sends nowhere what `out` still holds and gets: what else prints must not fail, nor Python
    when it ends."""
    # ValueError: a stream of a test has no file
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), out.fileno())
