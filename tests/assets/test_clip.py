"""The tokenizers shipped for original checkpoints, which come without one."""

import json
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from sdx.assets.make_tokenizer import END, END_OF_WORD, START, byte_letters
from sdx.data.tokenizer import load_tokenizer

CLIP = Path(str(files("sdx"))) / "assets" / "clip"
TEXTS = ["a photo of a cat", "hi!! !", "", "Naïve <|ENDOFTEXT|> 日本 don't", "red " * 99]


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_the_vocabulary_is_whole(kind: str) -> None:
    """CLIP's ids are the bytes, the bytes that end a word, the merges in order, and two tokens."""
    vocabulary = json.loads((CLIP / kind / "vocab.json").read_text(encoding="utf-8"))
    version, *lines = (CLIP / kind / "merges.txt").read_text(encoding="utf-8").splitlines()
    letters = list(byte_letters().values())
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters)]
    tokens += [*("".join(line.split(" ")) for line in lines), START, END]
    assert version == "#version: 0.2" and len(tokens) == 49408
    assert vocabulary == {token: i for i, token in enumerate(tokens)}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("kind", "pad", "marks"), [("sd1", 49407, [748, 256]), ("sd2", 0, [0, 0, 0])]
)
def test_published_ids(kind: str, pad: int, marks: list[int]) -> None:
    """2.x takes every "!" for its padding, as diffusers does (its issues 2201 and 4153)."""
    cat, hi = load_tokenizer(CLIP / kind).encode(TEXTS[:2]).tolist()
    assert cat == [49406, 320, 1125, 539, 320, 2368, 49407] + [pad] * 70
    assert hi[: len(marks) + 3] == [49406, 1883, *marks, 49407]


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_transformers_reads_them_alike(kind: str) -> None:
    transformers: Any = import_module("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(CLIP / kind)
    rows = theirs(TEXTS, padding="max_length", truncation=True, max_length=77)["input_ids"]
    assert load_tokenizer(CLIP / kind).encode(TEXTS).tolist() == rows
