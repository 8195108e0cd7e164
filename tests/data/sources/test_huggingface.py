"""Datasets of the Hub: what is downloaded, at which commit, and why one cannot be had."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from sdx.config.schema import DataConfig, DataKind
from sdx.data.source import DataError, Source
from sdx.data.sources import hub as hub_module
from sdx.data.sources.open import open_source
from tests.data.sources.test_open import colours
from tests.data.stored import as_folder, as_image_repository, as_repository, as_saved, plain
from tests.weights.hub_server import COMMIT, SIGNATURE, Hub, Repository, serve

pytestmark = pytest.mark.usefixtures("own_caches")

NAME = "somebody/pictures"
TOKEN = "hf_" + "canary" * 6


def content_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository with two splits and what such repositories tend to have besides."""
    folder = tmp_path_factory.mktemp("repository")
    as_repository(folder / "a", plain(5))
    as_repository(folder / "b", plain(2), split="test")
    card = (
        b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        b"    path: data/train-*\n  - split: test\n    path: [data/test-*]\n---\n"
    )
    files = content_of(folder / "a") | content_of(folder / "b") | {"README.md": card}
    return files | {"pictures.py": b"raise SystemExit('run!')", "big.tar": b"\0" * 5000}


@pytest.fixture
def hub(
    content: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """The client of this process asks this one; its caches are empty, and it has no token."""
    with serve(Hub({f"datasets/{NAME}": Repository(dict(content))})) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(hub_module, "_WAITS_S", (0.0, 0.0))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield hub


def opened(
    name: str | None = NAME,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    dir: str | None = None,
) -> Source:
    kind = DataKind.huggingface
    data = DataConfig(kind=kind, name=name, split=split, config=config, revision=revision, dir=dir)
    return open_source(data, resolution=16, say=lambda line: None)


def refusal(name: str | None = NAME, **options: str) -> str:
    with pytest.raises(DataError) as caught:
        opened(name, **options)
    return str(caught.value)


def test_only_the_split_is_downloaded_and_its_commit_is_known(hub: Hub) -> None:
    source = opened()
    assert colours(source) == [0, 1, 2, 3, 4]
    files = {f"data/train-{number:05}-of-00002.parquet" for number in (0, 1)}
    assert hub.fetched() == {"README.md", *files}
    assert {path.split("/")[5] for _, path in hub.requests if "/resolve/" in path} == {COMMIT}
    assert getattr(source, "provenance") == {"source": NAME, "commit": COMMIT}  # noqa: B009
    assert colours(opened(split="test[:1]")) == [0]


def test_images_of_a_repository_are_read_as_a_folder_of_them(hub: Hub, tmp_path: Path) -> None:
    as_folder(tmp_path / "a", plain(3))
    as_folder(tmp_path / "a", plain(2), split="test")
    hub.repositories[f"datasets/{NAME}"].files = content_of(tmp_path / "a")
    source = opened()
    assert colours(source) == [0, 1, 2]
    assert source[1].captions == ("n1",)


@pytest.mark.parametrize("way", ["offline", "no network", "deleted"])
def test_the_cache_is_enough(hub: Hub, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    before = opened()
    if way == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif way == "deleted":
        hub.repositories.clear()
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for revision in (None, COMMIT):
        if way == "deleted" and revision is None:
            continue  # the Hub says that it is gone; a run resumes by the commit
        source = opened(revision=revision)
        assert source.fingerprint == before.fingerprint


def test_what_cannot_be_had_is_said_with_what_to_do(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    message = refusal("somebody/else")
    assert message.startswith("data.name=somebody/else: could not be had from the Hugging Face Hub")
    assert "check data.name; if it is private, log in" in message and "data.dir" in message
    assert "data=naruto" in refusal("diffusers/pokemon-gpt4-captions")
    assert "check data.revision" in refusal(revision="v2")
    gone = refusal("lambdalabs/pokemon-blip-captions")
    assert "DMCA" in gone and "data=pokemon" in gone and "data=naruto" in gone
    hub.repositories[f"datasets/{NAME}"].gated = True
    gated = refusal()
    assert "accept its terms on its page" in gated
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    unreachable = refusal("diffusers/pokemon-gpt4-captions")
    assert "the Hub cannot be reached" in unreachable and "data.dir=FOLDER" in unreachable
    assert "hf download --repo-type dataset diffusers/pokemon-gpt4-captions" in unreachable
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = refusal()
    assert "unset HF_HUB_OFFLINE" in offline or "the Hub cannot be reached" in offline
    assert TOKEN not in "".join([message, gone, gated, unreachable, offline])


def test_a_token_is_sent_and_a_busy_hub_is_asked_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[f"datasets/{NAME}"].token = TOKEN
    assert "log in with `hf auth login`" in refusal()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.failures["data/train-00000-of-00002.parquet"] = [503, 429]
    assert len(opened()) == 5


def test_no_secret_in_any_message(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the user's token, nor the signature of an address that fails."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    file = "data/train-00000-of-00002.parquet"
    hub.repositories[f"datasets/{NAME}"].files[file] += b"\0" * 5000  # large: behind a signature
    hub.failures = {f"/signed/datasets/{NAME}/{file}": [503] * 20}
    message = refusal()
    assert "503" in message and "check network and disk" in message
    assert TOKEN not in message and SIGNATURE not in message


CARD = "---\nconfigs:\n- config_name: {}\n  data_files: data/train-*\n{}---\n"


def test_configurations_and_splits_of_a_local_copy(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    as_repository(folder, plain(3))
    (folder / "pictures.py").write_text("raise SystemExit('run!')")
    name = str(folder)
    assert "data.split=test: " in refusal(name, split="test")
    assert refusal(name, config="small") == f"data.config=small: {folder} has default."
    second = "- config_name: {}\n  data_files: [{{split: train, path: data/train-00000*}}]\n"
    (folder / "README.md").write_text(CARD.format("large", second.format("small")))
    assert "has the configurations large, small; set one" in refusal(name)
    assert len(opened(name, config="large")) == 3
    assert len(opened(name, config="small")) == 1
    (folder / "README.md").write_text(CARD.format("large", "").replace("data/", "data/**/"))
    assert len(opened(name)) == 3
    (folder / "README.md").write_text("no metadata")
    assert len(opened(None, dir=name)) == 3, "files of a split are known by their names"
    assert "names no configurations" in refusal(name, config="small")


@pytest.mark.parametrize("has_card", [True, False])
def test_a_part_of_the_files_is_not_taken_for_all(tmp_path: Path, has_card: bool) -> None:
    """Left by an interrupted download, for instance; naruto's files end in a hash."""
    folder = tmp_path / "copy"
    as_repository(folder, plain(4))
    for number, file in enumerate(sorted((folder / "data").iterdir())):
        file.rename(folder / f"data/train-{number:05}-of-00002-{number}efa2f480689f147.parquet")
    if not has_card:
        (folder / "README.md").unlink()
    assert len(opened(None, dir=str(folder))) == 4
    next((folder / "data").iterdir()).unlink()
    assert "has 1 of the 2 files data/train-*-of-00002" in refusal(None, dir=str(folder))


def test_keys_that_do_nothing_with_a_local_copy_are_refused(tmp_path: Path) -> None:
    as_repository(tmp_path / "copy", plain(2))
    assert "data.revision=v2: has no effect" in refusal(str(tmp_path / "copy"), revision="v2")
    as_saved(tmp_path / "saved", plain(2))
    assert "data.config=small: has no effect" in refusal(str(tmp_path / "saved"), config="small")
    config = as_image_repository(tmp_path / "images", plain(2))
    with pytest.raises(DataError, match="data.image_column=picture: has no effect"):
        open_source(replace(config, image_column="picture"), resolution=16)


def test_a_saved_dataset_names_its_splits(tmp_path: Path) -> None:
    config = as_saved(tmp_path / "saved", plain(2), split="test")
    assert len(opened(config.dir, split="test")) == 2
    assert refusal(config.dir).endswith("has the splits test.")


@pytest.mark.fast
@pytest.mark.parametrize(
    "file, said",
    [
        ("0.tar", "tar shards are read with data=webdataset"),
        ("pictures.py", "a script, which sdx does not run"),
        ("table.csv", "convert it (docs/your_own_dataset.md)"),
    ],
)
def test_what_is_no_data_is_refused(tmp_path: Path, file: str, said: str) -> None:
    (tmp_path / file).write_bytes(b"x")
    assert said in refusal(None, dir=str(tmp_path))
    assert "no such folder" in refusal(str(tmp_path / "absent"))


@pytest.mark.fast
def test_images_of_a_local_copy_may_not_lie_elsewhere(tmp_path: Path) -> None:
    config = as_image_repository(tmp_path / "copy", plain(2))
    (tmp_path / "secret.png").write_bytes(plain(1)[0].image)
    (tmp_path / "copy/train/link.png").symlink_to(tmp_path / "secret.png")
    assert "a link that leads out" in refusal(config.name)
