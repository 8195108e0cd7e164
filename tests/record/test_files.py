"""Text on disk: old or new, never torn, and without secrets."""

import os
from enum import Enum
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sdx.record.files import DamagedRecord, read_json, write_json, write_text
from sdx.record.redact import redact

pytestmark = pytest.mark.fast


class Colour(Enum):
    red = 7


def test_json_comes_back_with_enums_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_json(path) is None
    write_json(path, {"colour": Colour.red, "path": Path("a/b"), "text": "größe"})
    assert read_json(path) == {"colour": "red", "path": "a/b", "text": "größe"}


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DamagedRecord, match=r"a\.json"):
        read_json(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_is_replaced_and_never_written_into(tmp_path: Path) -> None:
    """A reader or a kill half-way through then finds one whole text or the other."""
    path, same_file = tmp_path / "a.txt", tmp_path / "link"
    write_text(path, "old")
    os.link(path, same_file)
    write_text(path, "new")
    assert (path.read_text(), same_file.read_text()) == ("new", "old")
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.txt", "link"}


TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"export HF_TOKEN={TOKEN} now", "export HF_TOKEN=REDACTED now"),
        (f'["model.token={TOKEN}"]', '["model.token=REDACTED"]'),
        ("key AKIAIOSFODNN7EXAMPLE.", "key REDACTED."),
        ("Authorization: Bearer abc.DEF-123_456~789/+=", "Authorization: Bearer REDACTED"),
        ("https://me:p%40ss@host.org/x?a=b", "https://REDACTED@host.org/x?a=b"),
        ("s3://token@bucket/key", "s3://REDACTED@bucket/key"),
        ("https://host.org/~me/a@b", "https://host.org/~me/a@b"),
        ("num_tokens=77 token_ids hf_hub", "num_tokens=77 token_ids hf_hub"),
        ("a bearer standing in the snow", "a bearer standing in the snow"),
        ("Bearer extraordinarinessquest", "Bearer extraordinarinessquest"),
        ("git@github.com:owner/name", "git@github.com:owner/name"),
    ],
)
def test_secrets_go_and_words_stay(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(redact(text)) == expected


def test_a_blotted_secret_leaves_yaml_that_can_be_read(tmp_path: Path) -> None:
    write_text(tmp_path / "config.yaml", f"tags:\n- {TOKEN}\nname: {TOKEN}\n")
    assert OmegaConf.load(tmp_path / "config.yaml") == {"tags": ["REDACTED"], "name": "REDACTED"}


def test_what_is_written_is_redacted_and_still_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"argv": [f"--token={TOKEN}", "https://u:p@h/"], "n": 1})
    assert read_json(tmp_path / "a") == {
        "argv": ["--token=REDACTED", "https://REDACTED@h/"],
        "n": 1,
    }
