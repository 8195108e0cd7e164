"""What is tried again, what is not, and what the messages must not say."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdx.experiment import publishing
from sdx.experiment.publishing import PublishError, publish
from tests.experiment.hub_uploads import COMMIT, HubUploads

TOKEN = "canary-91ab"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubUploads]:
    """The stand-in, asked by this process; nobody waits."""
    with HubUploads(TOKEN) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(publishing, "WAITS_S", (0.0, 0.0))
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("---\nlicense: other\n---\n")
    return tmp_path


@pytest.mark.filterwarnings("ignore:Use 'content=")  # huggingface_hub's own use of its HTTP client
def test_a_service_that_comes_back(hub: HubUploads, folder: Path) -> None:
    said: list[str] = []
    hub.failures["/repos/create"] = [503]
    hub.failures["/objects/batch"] = [500]  # huggingface_hub's own second try
    assert publish(folder, "me/model", title="x", say=said.append).endswith(COMMIT)
    assert len(said) == 1 and "503" in said[0]
    assert hub.repositories["me/model"]["unet/model.safetensors"] == b"weights"


def test_a_service_that_does_not(hub: HubUploads, folder: Path) -> None:
    said: list[str] = []
    hub.failures["/repos/create"] = [503] * 9
    with pytest.raises(PublishError, match=r"me/model: not uploaded .*503.*has the files"):
        publish(folder, "me/model", title="x", say=said.append)
    assert len(said) == 2
    assert sum("/repos/create" in line for line in hub.requests) == 3


def test_who_may_not_write_is_not_asked_twice(
    hub: HubUploads, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "another-canary")
    said: list[str] = []
    with pytest.raises(PublishError, match="401") as error:
        publish(folder, "me/model", title="x", say=said.append)
    assert not said and "canary" not in str(error.value)
    assert error.value.__cause__ is None and error.value.__suppress_context__


@pytest.mark.fast
def test_addresses_lose_their_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    error = RuntimeError("Error while uploading")
    error.__cause__ = OSError(f"503 for 'https://s3/x?X-Amz-Signature=abc&y=1' {TOKEN}\nmore")
    said = publishing._reason(error)
    assert said == "Error while uploading: 503 for 'https://s3/x' REDACTED"
    assert not re.search("abc|more", said)
