"""The message `tf.train.Example`, as the records of TensorFlow's tools hold it; bytes alone.

Owns the wire format of what sdx reads and writes of it (tensorflow/core/example/feature.proto;
protobuf.dev/programming-guides/encoding): Example {Features features = 1}, Features {map<string,
Feature> feature = 1}, Feature {BytesList 1 | FloatList 2 | Int64List 3}, BytesList {repeated bytes
value = 1}.
"""

from collections.abc import Iterator, Mapping, Sequence

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
_LISTS = {1: "bytes", 2: "floats", 3: "integers"}


def parse_example(message: bytes) -> dict[str, list[bytes] | str]:
    """Lists of bytes by name; of other lists, what they hold: `floats` or `integers`.

    Raises ValueError where it is no such message.
    """
    found: dict[str, list[bytes] | str] = {}
    for features in _values(message, 1):
        for entry in _values(features, 1):
            names, values = list(_values(entry, 1)), list(_values(entry, 2))
            if names:
                found[names[-1].decode()] = _feature(values[-1] if values else b"")
    return found


def make_example(features: Mapping[str, Sequence[bytes]]) -> bytes:
    """The message that holds these lists of bytes by name."""
    entries = b""
    for name, values in features.items():
        bytes_list = b"".join(_field(1, value) for value in values)
        entries += _field(1, _field(1, name.encode()) + _field(2, _field(1, bytes_list)))
    return _field(1, entries)


def _feature(message: bytes) -> list[bytes] | str:
    for number, value in _fields(message):
        if number == 1 and isinstance(value, bytes):
            return list(_values(value, 1))
        if number in _LISTS:
            return _LISTS[number]
    return []


def _values(message: bytes, wanted: int) -> Iterator[bytes]:
    """What the fields of this number hold."""
    for number, value in _fields(message):
        if number == wanted:
            if not isinstance(value, bytes):
                raise ValueError(f"field {number} is a number")
            yield value


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of each field; fixed-width numbers come as bytes."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, place = _varint(message, place)
            yield number, value
            continue
        if kind == _DELIMITED:
            length, place = _varint(message, place)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if place + length > len(message):
            raise ValueError("it is cut off")
        yield number, message[place : place + length]
        place += length


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """The number at `place`, seven bits a byte, and the place behind it."""
    number = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            raise ValueError("it is cut off")
        byte = message[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
    raise ValueError("a number of more than ten bytes")


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | _DELIMITED]) + _length(len(content)) + content


def _length(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
