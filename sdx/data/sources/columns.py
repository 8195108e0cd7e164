"""Which columns of a table hold images and captions, and what is said where they do not."""

from collections.abc import Mapping
from dataclasses import dataclass

from sdx.data.source import DataError

IMAGE, TEXT = "image", "text"
"""Kinds of columns that can be images, and captions."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold the image and its captions."""

    image: str = "image"
    caption: str = "text"


def check_columns(kinds: Mapping[str, str], place: str, columns: Columns) -> None:
    """Raises DataError with both faults, what columns there are, and which could be meant.

    `kinds` says of each column what it holds: `IMAGE`, `TEXT`, or any other name.
    """
    wanted = {
        "data.image_column": (columns.image, IMAGE, "images"),
        "data.caption_column": (columns.caption, TEXT, "texts or lists of texts"),
    }
    faults = []
    for key, (column, kind, what) in wanted.items():
        if kinds.get(column) == kind:
            continue
        fault = f"{key}={column}: "
        fault += f"holds no {what}" if column in kinds else "there is no such column"
        if fitting := [name for name, found in kinds.items() if found == kind]:
            fault += f"; set {key}={' or '.join(fitting)}"
        else:
            fault += f"; no column holds {what}"
        faults.append(fault)
    if faults:
        there = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise DataError("\n".join(faults) + f".\nThe columns of {place} are {there}.")
