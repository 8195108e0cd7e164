"""Captions to token ids, with the ids transformers' CLIPTokenizer (5.x) gives.

CLIP tokenizers are built here from their vocabulary with the `tokenizers` package; importing
transformers costs seconds and is left to folders that hold some other tokenizer. What transformers
does and this file repeats (transformers/models/clip/tokenization_clip.py,
tokenization_utils_base.py):

- The pipeline is rebuilt from vocabulary and merges even where a tokenizer.json spells out another
  one.
- special_tokens_map.json wins over tokenizer_config.json, unless the latter has
  `added_tokens_decoder`: then it is not read.
- The padding token is a special token wherever it occurs. Stable Diffusion 2.x pads with "!", so
  each "!" of a caption becomes the padding id 0 instead of the id the vocabulary gives it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from sdx.data.source import DataError

_CLIP_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
_END = "<|endoftext|>"
_NAMED_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": _END,
    "unk_token": _END,
    "sep_token": None,
    "pad_token": _END,
    "cls_token": None,
    "mask_token": None,
}  # in the order transformers adds them
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@runtime_checkable
class Tokenizer(Protocol):
    """Captions to rows of ids: start token, words, end token, padding; a long caption keeps its end
    token.
    """

    @property
    def max_length(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def pad_token_id(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> Int32[np.ndarray, "b s"]: ...


def load_tokenizer(
    folder: Path, *, max_length: int = 77, num_embeddings: int | None = None
) -> Tokenizer:
    """The tokenizer of a diffusers-layout model's `tokenizer` folder; rows have `max_length` ids.

    `num_embeddings` is what the text encoder knows: an id past it would be NaN without a word.
    Raises `DataError` where the folder holds no tokenizer, or one with more ids than that.
    """
    config = _read_json(folder / "tokenizer_config.json")
    tokenizer: Tokenizer
    if config.get("tokenizer_class", _CLIP_CLASSES[0]) in _CLIP_CLASSES:
        tokenizer = ClipTokenizer(folder, config, max_length)
    else:
        tokenizer = TransformersTokenizer(folder, max_length)
    if num_embeddings is not None and tokenizer.vocab_size > num_embeddings:
        raise DataError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, the text encoder knows only "
            f"{num_embeddings}; they belong to different models: take the tokenizer this text "
            "encoder was trained with."
        )
    return tokenizer


class ClipTokenizer:
    """CLIP's byte-level BPE; picklable, so that loader processes can have it."""

    def __init__(self, folder: Path, config: dict[str, Any], max_length: int):
        vocab, merges, file_tokens = _read_bpe(folder)
        named, added = _special_tokens(folder, config, file_tokens)
        self.max_length = max_length
        self._backend = _clip_backend(vocab, merges, named["unk_token"], added)
        self.pad_token_id = self._id(named["pad_token"])
        bos, eos = named["bos_token"], named["eos_token"]
        self._backend.post_processor = processors.RobertaProcessing(
            (str(eos), self._id(eos)),
            (str(bos), self._id(bos)),
            trim_offsets=False,
            add_prefix_space=False,
        )
        self._backend.enable_truncation(max_length)
        self._backend.enable_padding(
            pad_id=self.pad_token_id, pad_token=str(named["pad_token"]), length=max_length
        )

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> Int32[np.ndarray, "b s"]:
        rows = [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts))]
        return np.asarray(rows, np.int32).reshape(len(rows), self.max_length)

    def _id(self, token: AddedToken) -> int:
        token_id = self._backend.token_to_id(str(token))
        assert token_id is not None, "special tokens are added to the vocabulary"
        return token_id


class TransformersTokenizer:
    """Whatever tokenizer transformers finds in the folder."""

    def __init__(self, folder: Path, max_length: int):
        from transformers import AutoTokenizer

        self.max_length = max_length
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if self._tokenizer.pad_token_id is None:
            raise DataError(
                f"{folder}: its tokenizer has no padding token; name one in tokenizer_config.json."
            )

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    @property
    def pad_token_id(self) -> int:
        return self._tokenizer.pad_token_id

    def encode(self, texts: Sequence[str]) -> Int32[np.ndarray, "b s"]:
        batch = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.max_length
        )
        return np.asarray(batch["input_ids"], np.int32).reshape(len(texts), self.max_length)


def _clip_backend(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    unknown: AddedToken,
    added: list[AddedToken],
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=str(unknown),
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.add_tokens(added)
    return backend


def _read_bpe(
    folder: Path,
) -> tuple[dict[str, int], list[tuple[str, str]], list[dict[str, Any]] | None]:
    """Vocabulary, merges and, from a tokenizer.json only, the tokens added to it."""
    whole = folder / "tokenizer.json"
    if whole.is_file():
        content = _read_json(whole)
        model = content["model"]
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        return model["vocab"], [(left, right) for left, right in pairs], content["added_tokens"]
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder}: no {' and no '.join(missing)}; a CLIP tokenizer is tokenizer.json, or"
            " vocab.json and merges.txt. Give model.pretrained a folder whose tokenizer/ has them."
        )
    vocab, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return vocab, merges, None


def _special_tokens(
    folder: Path, config: dict[str, Any], file_tokens: list[dict[str, Any]] | None
) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """The tokens with a role, by role, and all added tokens in the order of their adding.

    A token named twice is added twice: the later one decides whether it is found in any case.
    """
    roles: dict[str, Any] = {**_NAMED_TOKENS, **{k: v for k, v in config.items() if v is not None}}
    extra: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        extra = {int(i): _added_token(t) for i, t in config["added_tokens_decoder"].items()}
    else:
        roles |= {
            role: {**token, "special": True} if isinstance(token, dict) else token
            for role, token in _read_json(folder / "special_tokens_map.json").items()
        }
        for text, token_id in _read_json(folder / "added_tokens.json").items():
            is_role = text in (_content(roles[role]) for role in _NAMED_TOKENS)
            extra[token_id] = AddedToken(text, normalized=not is_role, special=is_role)
        for token in file_tokens or []:
            extra[token["id"]] = _added_token({k: v for k, v in token.items() if k != "id"})
    by_text = {str(token): token for token in extra.values()}
    named = {
        role: by_text.get(_content(roles[role]), _added_token(roles[role]))
        for role in _NAMED_TOKENS
        if roles[role] is not None
    }
    others = (_added_token(token) for token in roles.get("additional_special_tokens") or [])
    added = [token for _, token in sorted(extra.items())]
    return named, added + [t for t in (*named.values(), *others) if str(t) not in by_text]


def _content(token: str | dict[str, Any] | None) -> str:
    return token["content"] if isinstance(token, dict) else token or ""


def _added_token(token: str | dict[str, Any]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    return AddedToken(**{name: value for name, value in token.items() if name != "__type"})


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not a JSON file ({error}); download the model again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds {type(content).__name__}, must be a JSON object.")
    return content
