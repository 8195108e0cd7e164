"""Slices of splits mean what they mean in the datasets library."""

import pytest
from datasets.arrow_reader import ReadInstruction

from sdx.config.splits import Split, parse_split

pytestmark = pytest.mark.fast

SLICES = "[:] [:95%] [95%:] [33%:66%] [-10%:] [:-1%] [3:] [:3] [-3:] [2:-2] [:1_000] [500:] [5:2]"


@pytest.mark.parametrize("text", SLICES.split())
@pytest.mark.parametrize("length", [1, 7, 99, 150, 1221])
def test_slices_are_those_of_datasets(text: str, length: int):
    split = f"train{text}"
    (theirs,) = ReadInstruction.from_spec(split).to_absolute({"train": length})
    assert parse_split(split).rows(length) == range(theirs.from_, max(theirs.from_, theirs.to))


def test_two_parts_hold_every_example_once():
    for length in range(1, 250):
        first, second = parse_split("train[:95%]"), parse_split("train[95%:]")
        assert [*first.rows(length), *second.rows(length)] == list(range(length))


def test_a_name_alone_is_all_of_it():
    assert parse_split("fine art") == Split("fine art")
    assert parse_split("train").rows(3) == range(3)


@pytest.mark.parametrize(
    "text, said",
    [
        ("train[", "must be NAME[START:STOP]"),
        ("train[5]", "must be NAME[START:STOP]"),
        ("train[:5]+test", "must be NAME[START:STOP]"),
        ("train[:5](pct1_dropremainder)", "must be NAME[START:STOP]"),
        ("train[:x]", "whole numbers"),
        ("train[:1.5%]", "whole numbers"),
        ("train[10:50%]", "both numbers or both percentages"),
        ("train[:101%]", "between -100 and 100"),
        ("../train[:1]", "not a path"),
        ("[:1]", "the name of a split"),
        ("", "the name of a split"),
    ],
)
def test_what_is_no_slice_is_said(text: str, said: str):
    with pytest.raises(ValueError) as caught:
        parse_split(text)
    assert said in str(caught.value)
