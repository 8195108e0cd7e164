"""ArrayRecord files of tf.train.Example messages: the wire format, and what is no example."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from sdx.config.schema import DataConfig, DataKind
from sdx.data.source import DataError
from sdx.data.sources.arrayrecord import write
from sdx.data.sources.checked import CheckedSource
from sdx.data.sources.columns import Columns
from sdx.data.sources.open import open_source
from sdx.data.sources.tf_example import make_example, parse_example
from tests.data.sources.test_open import colours
from tests.data.stored import plain

pytestmark = [pytest.mark.usefixtures("own_caches"), pytest.mark.fast]

IMAGES = [example.image for example in plain(6)]


def protobuf_example() -> Any:
    """The message class that protobuf makes of tensorflow/core/example/*.proto."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="sdx.test")
    field = descriptor_pb2.FieldDescriptorProto
    text = {
        "BytesList": [("value", 1, field.TYPE_BYTES, None, True)],
        "FloatList": [("value", 1, field.TYPE_FLOAT, None, True)],
        "Int64List": [("value", 1, field.TYPE_INT64, None, True)],
        "Feature": [
            ("bytes_list", 1, field.TYPE_MESSAGE, "BytesList", False),
            ("float_list", 2, field.TYPE_MESSAGE, "FloatList", False),
            ("int64_list", 3, field.TYPE_MESSAGE, "Int64List", False),
        ],
        "Entry": [
            ("key", 1, field.TYPE_STRING, None, False),
            ("value", 2, field.TYPE_MESSAGE, "Feature", False),
        ],
        "Features": [("feature", 1, field.TYPE_MESSAGE, "Entry", True)],
        "Example": [("features", 1, field.TYPE_MESSAGE, "Features", False)],
    }
    for name, fields in text.items():
        message = file.message_type.add(name=name)
        for title, number, kind, of, is_list in fields:
            label = field.LABEL_REPEATED if is_list else field.LABEL_OPTIONAL
            added = message.field.add(name=title, number=number, type=kind, label=label)
            if of:
                added.type_name = f".sdx.test.{of}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("sdx.test.Example"))


PROTOBUF = protobuf_example()


@given(st.dictionaries(st.text(max_size=9), st.lists(st.binary(max_size=300), max_size=4)))
def test_messages_are_those_of_protobuf(features: dict[str, list[bytes]]) -> None:
    message = make_example(features)
    read = PROTOBUF.FromString(message)
    found = {e.key: list(e.value.bytes_list.value) for e in read.features.feature}
    assert found == features
    assert parse_example(read.SerializeToString()) == features


def test_lists_of_numbers_are_named() -> None:
    example = PROTOBUF()
    for name, values in {"a": [1.5, 2.0], "b": [-1, 7]}.items():
        entry = example.features.feature.add(key=name)
        numbers = entry.value.float_list if name == "a" else entry.value.int64_list
        numbers.value.extend(values)
    assert parse_example(example.SerializeToString()) == {"a": "floats", "b": "integers"}


@given(st.binary(max_size=60))
def test_no_message_is_a_value_error_and_nothing_else(content: bytes) -> None:
    try:
        parse_example(content)
    except ValueError:
        pass


def opened(folder: Path, **options: Any) -> CheckedSource:
    config = DataConfig(kind=DataKind.arrayrecord, dir=str(folder), max_bad_fraction=1.0)
    source = open_source(replace(config, **options), resolution=16, say=lambda line: None)
    assert isinstance(source, CheckedSource)
    return source


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        opened(folder, **options)
    return str(caught.value)


def write_records(path: Path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_what_write_wrote_is_read(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(IMAGES[3])
    columns = Columns("picture", "about")
    examples = [(image, "a file"), (IMAGES[4], ["its bytes", "two"])]
    assert write(tmp_path / "a.array_record", examples, columns) == 2
    source = opened(tmp_path, image_column="picture", caption_column="about")
    assert colours(source) == [3, 4]
    assert source[1].captions == ("its bytes", "two")
    message = refusal(tmp_path)
    assert "set data.image_column=picture" in message and "set data.caption_column=about" in message
    assert [path.name for path in tmp_path.glob("*.array_record")] == ["a.array_record"]


def test_an_interrupted_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "a.array_record", [(IMAGES[0], "x"), (tmp_path / "absent.png", "y")])
    assert not list(tmp_path.glob("*.array_record"))


def test_records_that_are_no_examples_are_bad(tmp_path: Path) -> None:
    good = {"image": [IMAGES[0]], "text": [b"good"]}
    records = [
        make_example(good),
        make_example({**good, "image": []}),
        make_example({**good, "text": [b"\xff"]}),
        make_example({"image": [IMAGES[0]]}),
        b"\xff" * 20,
        make_example({**good, "image": [IMAGES[5]]}),
    ]
    write_records(tmp_path / "a.arrayrecord", records)
    source = opened(tmp_path)
    assert colours(source) == [0, 5]
    assert {bad.path: bad.reason for bad in source.bad_images} == {
        "a.arrayrecord:1": "missing",
        "a.arrayrecord:2": "caption not UTF-8",
        "a.arrayrecord:3": "no caption",
        "a.arrayrecord:4": "unreadable",
    }


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.array_record"
    write(file, [(image, "x") for image in IMAGES])
    for content in (b"no such file" * 9, file.read_bytes()[:-10], b""):
        file.write_bytes(content)
        assert "no whole ArrayRecord file" in refusal(tmp_path)
    write_records(file, [b"\xff" * 20])
    assert "its records are no tf.train.Example messages" in refusal(tmp_path)
    write_records(file, [make_example({"moments": [b""], "clip_embeddings": [b""]})])
    assert "as MaxDiffusion caches them" in refusal(tmp_path)
    write_records(file, [])
    assert "no record in the 1 files" in refusal(tmp_path)


def test_a_damaged_record_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a.array_record"
    write(file, [(image, f"n{i}") for i, image in enumerate(IMAGES)])
    content = bytearray(file.read_bytes())
    place = content.index(IMAGES[2])
    content[place + 60] ^= 0xFF
    file.write_bytes(content)
    source = opened(tmp_path)
    assert 2 not in colours(source) and len(source) == 5
