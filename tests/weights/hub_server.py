"""A stand-in for the Hub's download side: what a repository is, its files, and its refusals.

It answers as the Hub does to huggingface_hub's HTTP client: repository info, tree and `resolve`
with the headers that name commit, digest and size; `X-Error-Code` says why something is refused.
Large files are redirected with a signature in the address, as the Hub's are.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_BYTES = 2000  # files above are in Git LFS
SIGNATURE = "f00dfeed"


@dataclass
class Repository:
    """Files of one model or dataset, the same at every revision it has."""

    files: dict[str, bytes]
    commit: str = COMMIT
    """Of main and every other branch."""
    revisions: tuple[str, ...] = ("main", COMMIT)
    token: str | None = None
    """Who reads it must show this one."""
    gated: bool = False


@dataclass
class Hub:
    """Repositories by id, a dataset's as `datasets/OWNER/NAME`; `requests` notes (method, path),
    `failures` statuses to answer first.
    """

    repositories: dict[str, Repository]
    requests: list[tuple[str, str]] = field(default_factory=list)
    failures: dict[str, list[int]] = field(default_factory=dict)
    """End of a path -> statuses that its first GETs are answered with."""
    port: int = 0

    def environment(self, cache: Path) -> dict[str, str]:
        """What a client needs to know."""
        local = {"NO_PROXY": "127.0.0.1,localhost", "HF_HUB_DISABLE_XET": "1"}
        return local | {"HF_ENDPOINT": self.url, "HF_HOME": str(cache)}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> str:
        """Another host, as the Hub's: the client sends it no token."""
        return f"http://localhost:{self.port}"

    def fetched(self) -> set[str]:
        """Paths of files whose content was sent."""
        sent = re.compile(
            r"/(?:(?:datasets/)?[^/]+/[^/]+/resolve/[^/]+|signed/(?:datasets/)?[^/]+/[^/]+)/(.+)"
        )
        paths = [path for method, path in self.requests if method == "GET"]
        return {match[1] for path in paths if (match := sent.fullmatch(path))}


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Answers on a free port of this machine until the block ends."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        for end, statuses in self.hub.failures.items():
            if self.command == "GET" and path.endswith(end) and statuses:
                return self._refuse(statuses.pop(0))
        is_api, is_signed = path.startswith("/api/"), path.startswith("/signed/")
        path = path.removeprefix("/api/models").removeprefix("/api").removeprefix("/signed")
        of = "datasets/" if path.startswith("/datasets/") else ""
        owner, name, *rest = [*path.removeprefix("/datasets")[1:].split("/"), "", ""]
        repo_id = f"{of}{owner}/{name}"
        if is_signed:
            signed = parse_qs(urlsplit(self.path).query).get("X-Amz-Signature") == [SIGNATURE]
            content = self.hub.repositories[repo_id].files["/".join(rest).rstrip("/")]
            self._send(content) if signed else self._refuse(403)
        elif is_api:
            kind, revision, *_ = rest
            self._answer(repo_id, revision or "main", kind, "")
        else:
            kind, revision, *rest = rest
            self._answer(repo_id, revision, kind, "/".join(rest).rstrip("/"))

    def _answer(self, repo_id: str, revision: str, kind: str, path: str) -> None:
        repository = self.hub.repositories.get(repo_id)
        shown = self.headers.get("Authorization")
        if repository is None or (repository.token and shown != f"Bearer {repository.token}"):
            return self._refuse(401 if shown is None else 404, "RepoNotFound")
        if repository.gated:
            return self._refuse(403, "GatedRepo")
        if revision not in repository.revisions:
            return self._refuse(404, "RevisionNotFound")
        commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else repository.commit
        if kind == "tree":
            return self._send(json.dumps([_entry(*file) for file in repository.files.items()]))
        if kind in ("revision", ""):
            siblings = [{"rfilename": name} for name in repository.files]
            info = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
            return self._send(json.dumps(info | {"private": False, "tags": [], "downloads": 0}))
        if path not in repository.files:
            return self._refuse(404, "EntryNotFound")
        content = repository.files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob_id(content)}"'}
        if len(content) > LARGE_BYTES:
            address = f"{self.hub.storage}/signed/{repo_id}/{path}?X-Amz-Signature={SIGNATURE}"
            headers |= {
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
                "Location": address,
            }
            return self._send(b"", 302, headers)
        self._send(content, 200, headers)

    def _refuse(self, status: int, code: str | None = None) -> None:
        self._send("no\n", status, {"X-Error-Code": code} if code else {})

    def _send(
        self, content: str | bytes, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        content = content.encode() if isinstance(content, str) else content
        first = 0
        if (wanted := self.headers.get("Range")) and status == 200:
            first, status = int(wanted.removeprefix("bytes=").split("-")[0]), 206
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[first:])


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
    if len(content) <= LARGE_BYTES:
        return entry
    oid = hashlib.sha256(content).hexdigest()
    return entry | {"lfs": {"oid": oid, "size": len(content), "pointerSize": 130}}


def _blob_id(content: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
