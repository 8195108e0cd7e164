"""Writes the embedded model's tokenizer: CLIP's byte-level BPE with a vocabulary of a few hundred.

All 256 bytes are there, inside and at the end of a word, so any text can be encoded; every word of
a shapes caption is one token.
"""

import json
from collections import Counter
from pathlib import Path

from sdx.data.shapes import Attributes, combinations

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"


def write_tokenizer(folder: Path, max_length: int) -> int:
    """Writes vocab.json, merges.txt and the two settings files; returns the vocabulary's size."""
    merges = learn_merges(caption_words())
    letters = list(byte_letters().values())
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *map("".join, merges)]
    tokens += [START, END]
    special = {
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    settings = special | {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
    }
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    _write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", settings)
    return len(vocabulary)


def caption_words() -> list[str]:
    """The words of all captions of `data=shapes`, in order of the alphabet."""
    captions: list[Attributes] = [*combinations("train"), *combinations("validation")]
    return sorted({word for attributes in captions for word in attributes.caption.split()})


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the commonest pair first (Sennrich et al. 2016, arXiv 1508.07909), until
    each word is one token; among equals the first in the alphabet."""
    spelled = [[*word[:-1], word[-1] + END_OF_WORD] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(symbols) > 1 for symbols in spelled):
        pairs = Counter(pair for s in spelled for pair in zip(s, s[1:], strict=False))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(symbols, best) for symbols in spelled]
    return merges


def byte_letters() -> dict[int, str]:
    """A printable letter for each byte: itself where it is one, else one from U+0100 on (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
