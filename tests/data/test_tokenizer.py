"""Token ids equal those of transformers' CLIPTokenizer, for every way its files are written."""

import json
import pickle
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdx.data.source import DataError
from sdx.data.tokenizer import TransformersTokenizer, load_tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = [("t", "h"), ("th", "e</w>"), ("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>")]
TEXTS = [
    "",
    " ",
    "the red cat",
    "The  RED\tcat\r\n",
    "hi!! !",
    "!",
    "a!b",
    "don't, we'll; they'VE I'd",
    "THE CAT'S 2024",
    f"{END} the",
    f"the{START}cat",
    END.upper(),
    "<|endoftext",
    "cat " * 200,
    "c" * 500,
    "&amp; <b>cat</b> &lt;",
    "café cafe\u0301 ﬁne ½ ² İstanbul ẞ ǅ",
    "👩‍👩‍👧‍👦 🇩🇪 日本語 العربية",
    "\0\x01\x7f\u200b\ufeff\u2028\xa0x",
]

# Where pipelines of text part ways: contractions, cases that change length, composition, controls,
# scripts without blanks, joined emoji, markup, numbers, private and last code points, length.
NASTY = [
    *("\n", "?!?!", "!" * 100, "''", "'S", "it\u2019s we'LL'd've", "DON'T", "\u00b4s"),
    *(f"{START} a {END} b", f"{END}!{END}", f"{END} " * 40, "|endoftext|>", "<unk>", "[PAD]"),
    *("&#39;&nbsp;", "http://a.b/c?d=e&f=g#h", "C:\\x\\y", "a_b-c--d", "(beautiful:1.3) [a|b]"),
    *("1234567890", "3.14 1,000 50%", "⅓ Ⅷ ① ⅷ", "٠١٢٣ １２３", "$€£¥ C++ c# #tag @me ~`|\\ %s"),
    *("ſ ϓ ΑΣ ΌΔΟΣ ΣΑΣ", "Ǆ ǆ ﬃ ﷺ", "\u212b \u2126 \u212a \u0344 \u0958", "q\u0323\u0307"),
    *("e\u0301\u0301", "\u0301", " \u0301a", "\u1e9b\u0323", "각 \u1100\u1161\u11a8", "か\u309a"),
    *("中文，测试。", "한국어", "עִברִית हिन्दी ไทย", "𝔘𝟘𝟙", "👍🏽 ☺️ 🇩🇪🇫", "Z̸̢͎a̶l̷g̵o̸"),
    *("a\u00ada", "\u3000x\u1680x\u180e\x85", "a\x0bb\x0cc\x1c\x1d\x1e\x1f", "\u202e —–‐…“«"),
    *("\ufffd\ufffe\uffff", "\ue000\ud7ff", "\U0010ffff\U000e0001", "\U0001d15e \uf900"),
    *("x " * 75, "x " * 76, "é" * 200, "😀" * 100, "supercalifragilisticexpialidocious"),
]


def unicode_texts(count: int) -> list[str]:
    """Random texts of blanks, controls, Latin, Greek, Hebrew, marks, CJK, Hangul, ligatures,
    emoji.
    """
    ranges = [
        (0x20, 0x7E),
        (0x00, 0x20),
        (0xA0, 0x24F),
        (0x300, 0x36F),
        (0x370, 0x5FF),
        (0x2000, 0x206F),
        (0x4E00, 0x4EFF),
        (0xAC00, 0xAD00),
        (0xFB00, 0xFB06),
        (0x10000, 0x100FF),
        (0x1F300, 0x1F6FF),
    ]
    rng = random.Random(0)
    return [
        "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 120)))
        for _ in range(count)
    ]


def any_texts(count: int) -> list[str]:
    """Random texts over all of Unicode but half surrogates, its beginning more often."""
    rng = random.Random(1)
    lasts = [0x7F, 0x2FFF, 0xD7FF, 0x10FFFF]

    def character() -> str:
        code = rng.randint(0, rng.choice(lasts))
        return "\n" if 0xD800 <= code <= 0xDFFF else chr(code)

    return ["".join(character() for _ in range(rng.randint(0, 80))) for _ in range(count)]


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in CLIP's order (openai/CLIP
    simple_tokenizer).
    """
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + i) for i in range(len(others))]


def vocabulary() -> dict[str, int]:
    letters = byte_alphabet()
    entries = [*letters, *(f"{letter}</w>" for letter in letters)]
    entries += ["".join(pair) for pair in MERGES] + [START, END]
    return {entry: i for i, entry in enumerate(entries)}


def named(text: str) -> dict[str, Any]:
    return {
        "content": text,
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }


def write(folder: Path, config: dict[str, Any], special: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    merges = "\n".join(" ".join(pair) for pair in MERGES)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if special is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


def roles(pad: object, wrap: Any = lambda text: text) -> dict[str, Any]:
    return {
        "bos_token": wrap(START),
        "eos_token": wrap(END),
        "unk_token": wrap(END),
        "pad_token": pad,
    }


def added(text: str) -> dict[str, Any]:
    return {"__type": "AddedToken", **named(text)}


def decoder(*texts: str) -> dict[str, Any]:
    vocab = vocabulary()
    return {str(vocab[text]): {**named(text), "special": True} for text in texts}


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "stable diffusion 1": (roles(END, added), roles(END, named)),
    "stable diffusion 2": (roles(END, added), roles("!", named)),
    "config alone": (roles("!"), None),
    "no roles named": ({}, None),
    "decoder beats the map": (
        {**roles("!"), "added_tokens_decoder": decoder("!", START, END)},
        roles(END, named),
    ),
    "pad not in the vocabulary": (roles("<pad>"), None),
    "extra tokens in the decoder": (
        {
            **roles("!"),
            "additional_special_tokens": ["<sks>"],
            "added_tokens_decoder": decoder("!", START, END)
            | {str(len(vocabulary())): {**named("<sks>"), "special": True}},
        },
        None,
    ),
    "extra tokens": ({**roles("!"), "additional_special_tokens": ["<sks>"]}, None),
}


@pytest.fixture(params=LAYOUTS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / "tokenizer", *LAYOUTS[request.param])


def check_equal(folder: Path, more: Sequence[str] = ()) -> None:
    from transformers import CLIPTokenizer

    reference = CLIPTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    texts = [*TEXTS, *unicode_texts(300), "a <sks> cat <SKS>", "<pad> <PAD>", *more]
    expected = reference(texts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    ids = ours.encode(texts)
    assert ids.dtype == np.int32 and ids.shape == (len(texts), 77)
    for text, row, expected_row in zip(texts, ids.tolist(), expected, strict=True):
        assert row == expected_row, repr(text)
    assert ours.pad_token_id == reference.pad_token_id
    assert ours.vocab_size == len(reference)


def test_ids_equal_transformers(folder: Path):
    check_equal(folder)


@pytest.mark.parametrize("release", ["sd1", "sd2"])
def test_ids_of_the_published_vocabulary(release: str, repository: Path):
    """CLIP's own 49,408 tokens, whose merges a small vocabulary cannot show."""
    folder = repository / "sdx" / "assets" / "clip" / release
    check_equal(folder, [*NASTY, *any_texts(2000)])


def test_ids_equal_transformers_from_a_tokenizer_json(folder: Path):
    from transformers import CLIPTokenizer

    saved = folder.parent / "saved"
    CLIPTokenizer.from_pretrained(folder).save_pretrained(saved)
    assert (saved / "tokenizer.json").is_file()
    check_equal(saved)


def test_tokens_added_by_file(tmp_path: Path):
    folder = write(tmp_path / "tokenizer", roles("!"), roles("!", named))
    size = len(vocabulary())
    (folder / "added_tokens.json").write_text(json.dumps({"<sks>": size}))
    check_equal(folder)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write(tmp_path / "tokenizer", *LAYOUTS["stable diffusion 2"])


@pytest.mark.fast
def test_a_long_caption_keeps_its_end(plain: Path):
    vocab = vocabulary()
    row = load_tokenizer(plain, max_length=9).encode(["cat " * 50])[0].tolist()
    assert row == [vocab[START], *[vocab["cat</w>"]] * 7, vocab[END]]


@pytest.mark.fast
def test_exclamation_marks_are_padding_in_stable_diffusion_2(plain: Path):
    vocab = vocabulary()
    tokenizer = load_tokenizer(plain, max_length=6)
    assert tokenizer.pad_token_id == vocab["!"] == 0
    assert tokenizer.encode(["", "cat!"]).tolist() == [
        [vocab[START], vocab[END], 0, 0, 0, 0],
        [vocab[START], vocab["cat</w>"], 0, vocab[END], 0, 0],
    ]


@pytest.mark.fast
def test_no_texts_are_no_rows(plain: Path):
    assert load_tokenizer(plain).encode([]).shape == (0, 77)


@pytest.mark.fast
def test_more_ids_than_the_text_encoder_knows_are_refused(plain: Path):
    size = load_tokenizer(plain).vocab_size
    assert load_tokenizer(plain, num_embeddings=size).vocab_size == size
    with pytest.raises(DataError, match=f"has {size} ids, the text encoder knows only {size - 1}"):
        load_tokenizer(plain, num_embeddings=size - 1)


@pytest.mark.fast
def test_a_copy_in_another_process_gives_the_same_ids(plain: Path):
    tokenizer = load_tokenizer(plain)
    copy = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(copy.encode(TEXTS), tokenizer.encode(TEXTS))


@pytest.mark.fast
def test_clip_folders_do_not_import_transformers(plain: Path):
    program = (
        "import sys; from pathlib import Path; from sdx.data.tokenizer import load_tokenizer;"
        f"load_tokenizer(Path({str(plain)!r})).encode(['cat']);"
        "assert not {'transformers', 'torch', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)


def test_other_tokenizers_come_from_transformers(tmp_path: Path):
    from transformers import GPT2Tokenizer

    vocab = {letter: i for i, letter in enumerate(byte_alphabet())}
    reference = GPT2Tokenizer(vocab=vocab, merges=[], pad_token="!", eos_token="!")
    reference.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, max_length=12)
    assert isinstance(tokenizer, TransformersTokenizer)
    expected = reference(TEXTS, padding="max_length", truncation=True, max_length=12)["input_ids"]
    assert tokenizer.encode(TEXTS).tolist() == expected


@pytest.mark.fast
def test_missing_and_broken_files_are_named(tmp_path: Path, plain: Path):
    with pytest.raises(DataError, match=r"no vocab\.json and no merges\.txt"):
        load_tokenizer(tmp_path)
    (plain / "special_tokens_map.json").write_text("{")
    with pytest.raises(DataError, match=r"special_tokens_map\.json: not a JSON file"):
        load_tokenizer(plain)
