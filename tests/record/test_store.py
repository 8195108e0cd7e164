"""Objects as paths: what is there, whole or not at all, and what is said where it fails."""

import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from sdx.record import store
from sdx.record.files import read_json, write_json, write_text
from sdx.record.store import (
    ObjectPath,
    StoreError,
    as_path,
    local_copy,
    remove_tree,
    upload,
)
from tests.object_store import ENVIRONMENT


@pytest.fixture
def root(bucket: str) -> ObjectPath:
    path = as_path(f"{bucket}/runs//a/")
    assert isinstance(path, ObjectPath)
    return path


@pytest.mark.fast
def test_names_are_those_of_paths() -> None:
    path = as_path("s3://bucket/runs//run.1/metrics.jsonl")
    assert isinstance(path, ObjectPath)
    assert str(path) == "s3://bucket/runs/run.1/metrics.jsonl"
    assert (path.name, path.stem, path.suffix) == ("metrics.jsonl", "metrics", ".jsonl")
    assert str(path.with_suffix("") / "1") == "s3://bucket/runs/run.1/metrics/1"
    assert str(path.parent.parent.parent.parent) == "s3://bucket"
    assert as_path("~/x") == Path("~/x").expanduser()
    with pytest.raises(TypeError):
        open(path)  # type: ignore[call-overload]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/x", "s3:// or gs://"),
        ("s3://", "BUCKET"),
        ("s3://key:canary-secret@bucket/x", "environment"),
        ("s3://bucket/a/../b", r"\.\."),
        ("s3://bucket/a?versionId=1", r"\?"),
    ],
)
def test_urls_of_no_store_are_refused(url: str, said: str) -> None:
    with pytest.raises(StoreError, match=said) as caught:
        as_path(url)
    assert "canary" not in str(caught.value)


def test_objects_are_there_with_what_was_put_last(root: ObjectPath) -> None:
    assert not root.exists() and not root.is_dir()
    assert (list(root.iterdir()), root.files()) == ([], {})
    path = root / "x.txt"
    path.write_bytes(b"hello")
    write_text(path, "größe, AKIAIOSFODNN7EXAMPLE")
    assert path.read_text() == "größe, REDACTED"
    assert path.read_bytes(1, 2) == b"r" and path.size() == len(path.read_bytes())
    write_json(root / "deep" / "a.json", {"path": path})
    assert read_json(root / "deep" / "a.json") == {"path": str(path)}
    assert read_json(root / "none.json") is None
    assert [entry.name for entry in root.iterdir()] == ["deep", "x.txt"]
    assert [entry.name for entry in root.glob("*.txt")] == ["x.txt"]
    assert root.files().keys() == {"deep/a.json", "x.txt"}
    assert path.is_file() and not path.is_dir() and (root / "deep").is_dir()
    path.unlink()
    path.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        path.unlink()
    assert not path.exists()


def test_one_of_many_creates_an_object(root: ObjectPath) -> None:
    (root / "lock").create(b"first")
    with pytest.raises(FileExistsError, match="lock"):
        (root / "lock").create(b"second")
    assert (root / "lock").read_bytes() == b"first"


def test_folders_go_there_and_come_back(root: ObjectPath, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name, content in {"a/b/c": b"1" * 1000, "a/[d] e": b"2", "f": b""}.items():
        (tmp_path / name).write_bytes(content)
    upload(tmp_path, root / "tree")
    assert (root / "tree").files() == {"a/[d] e": 1, "a/b/c": 1000, "f": 0}
    with local_copy(root / "tree") as folder:
        assert (folder / "a" / "b" / "c").read_bytes() == b"1" * 1000
        assert (folder / "f").read_bytes() == b""
    assert not folder.exists()
    with local_copy(tmp_path) as folder:
        assert folder == tmp_path
    remove_tree(root / "tree")
    remove_tree(root / "tree")
    assert not root.exists()


def test_a_missing_bucket_is_named(root: ObjectPath, tmp_path: Path) -> None:
    elsewhere = as_path("s3://sdx-no-such-bucket/run")
    assert isinstance(elsewhere, ObjectPath)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="there is no s3://sdx-no-such-bucket; make it"):
        (elsewhere / "x").write_bytes(b"")
    with pytest.raises(StoreError, match="there is no s3://sdx-no-such-bucket; make it"):
        upload(tmp_path, elsewhere)
    assert list(elsewhere.iterdir()) == []


def test_trouble_that_passes_is_waited_for(
    root: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "x").write_bytes(b"1")
    monkeypatch.setattr(store, "WAITS_S", (0.0, 0.0))
    real, left = store._file_system, [0]

    def failing(scheme: str, pid: int) -> object:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError("slow down")
        return real(scheme, pid)

    monkeypatch.setattr(store, "_file_system", failing)
    left[0] = 2
    assert store.patiently(root.files) == {"x": 1}
    left[0] = 3
    with pytest.raises(StoreError, match="cannot be reached .slow down"):
        store.patiently(root.files)
    left[0] = 0
    with pytest.raises(FileNotFoundError):
        store.patiently((root / "y").read_bytes)
    assert left[0] == -1  # and what cannot pass is not tried again


def test_without_credentials_it_is_said_where_they_belong(
    flaky: tuple[type["_Flaky"], ObjectPath], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server, path = flaky
    with pytest.raises(StoreError, match=f"{path}: no credentials .*environment") as caught:
        path.write_bytes(b"")
    assert not caught.value.may_pass and not server.seen


@pytest.mark.fast
def test_a_missing_package_is_said_with_what_to_do() -> None:
    """And local runs import nothing of it."""
    script = """
import sys
from sdx.record import run, store
assert not {"fsspec", "s3fs", "gcsfs", "botocore"} & set(sys.modules)
sys.modules["s3fs"] = None
try:
    store.as_path("s3://bucket/x").exists()
except store.StoreError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "needs the package s3fs" in done.stdout and "pip install 'sdx[s3]'" in done.stdout


@pytest.mark.fast
def test_a_store_in_trouble_is_told_of_by_us_alone() -> None:
    """gcsfs logs a traceback of each request it gives up, to standard error unless told where."""
    script = """
import logging, sys
from sdx.record import store
sys.modules["gcsfs"] = None  # it would look for credentials
try:
    store.as_path("gs://bucket/x").exists()
except store.StoreError:
    logging.getLogger("gcsfs").error("out of retries")
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "refused\n" and not done.stderr, done.stderr


class _Flaky(BaseHTTPRequestHandler):
    """Passes requests on to a store; the first `busy` of them are answered with 503."""

    store = ""
    busy = 0
    seen: list[str] = []
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = type(self)
        kind.seen.append(self.command)
        if kind.busy > 0:
            kind.busy -= 1
            return self._send(503, b"<Error><Code>ServiceUnavailable</Code></Error>", {})
        headers = {"Content-Type": "binary/octet-stream", **self.headers}
        headers.pop("Expect", None)
        request = urllib.request.Request(
            kind.store + self.path, content or None, headers, method=self.command
        )
        try:
            with urllib.request.urlopen(request) as answer:
                self._send(answer.status, answer.read(), dict(answer.headers))
        except urllib.error.HTTPError as error:
            with error:
                self._send(error.code, error.read(), dict(error.headers))

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer

    def _send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def flaky(
    bucket: str, s3_address: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[type[_Flaky], ObjectPath]]:
    """The store behind a server that can be busy."""
    _Flaky.store, _Flaky.busy, _Flaky.seen = s3_address, 0, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Flaky)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    store._file_system.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    path = as_path(f"{bucket}/x")
    assert isinstance(path, ObjectPath)
    yield _Flaky, path
    server.shutdown()
    server.server_close()
    thread.join()
    store._file_system.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_busy_store_is_asked_again(flaky: tuple[type[_Flaky], ObjectPath]) -> None:
    server, path = flaky
    path.write_bytes(b"1")
    server.busy, server.seen = 2, []
    path.write_bytes(b"2")
    assert server.seen == ["PUT"] * 3
    assert path.read_bytes() == b"2"
    server.busy = 1
    assert path.read_bytes() == b"2"


def test_a_store_that_stays_busy_is_an_error_within_bounds(
    flaky: tuple[type[_Flaky], ObjectPath], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    server, path = flaky
    server.busy = 1000
    with pytest.raises(StoreError, match=f"{path}: cannot be reached") as caught:
        path.write_bytes(b"1")
    assert caught.value.may_pass and len(server.seen) <= 10
