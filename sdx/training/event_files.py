"""TensorBoard's event files, written with TensorBoard's own writer; neither TensorFlow nor torch is
needed."""

import io
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.summary.writer.record_writer import RecordWriter

from sdx.record.parts import Parts
from sdx.record.store import AnyPath, ObjectPath

# protobuf makes these classes when it is imported, where type checkers do not see them
Event: Any = vars(event_pb2)["Event"]
SessionLog: Any = vars(event_pb2)["SessionLog"]
Summary: Any = vars(summary_pb2)["Summary"]


class TensorBoardSink:
    """Scalars and pictures; a resumed run hides what an earlier attempt wrote from `first_step`
    on."""

    def __init__(self, folder: AnyPath, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = (
            _EventParts(folder) if isinstance(folder, ObjectPath) else EventFileWriter(str(folder))
        )
        self._add(first_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step, summary=Summary(value=scalars))

    def picture(self, step: int, tag: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        png = io.BytesIO()
        Image.fromarray(image).save(png, format="PNG")
        height, width, channels = image.shape
        encoded = Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue()
        )
        self._add(step, summary=Summary(value=[Summary.Value(tag=tag, image=encoded)]))

    def close(self, exit_code: int = 0) -> None:
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()


class _EventParts:
    """In place of EventFileWriter: files in a store, which TensorBoard reads one after the other by
    name, each a whole event file with its header."""

    def __init__(self, folder: ObjectPath):
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        header = _packed(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._parts = Parts(lambda number: folder / f"{name}.{number:06d}", 1, header)

    def add_event(self, event: Any) -> None:
        self._parts.append(_packed(event))

    def flush(self) -> None:
        """It is on its way."""

    def close(self) -> None:
        """Nothing is open."""


def _packed(event: Any) -> bytes:
    """The event as a record of an event file."""
    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    return record.getvalue()
