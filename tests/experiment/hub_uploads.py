"""A stand-in for the Hub's upload side: repositories, pre-upload, LFS and commits, over HTTP.

It offers plain LFS. huggingface_hub prefers its Xet client where that is installed, so a client
that shall talk to this server runs with HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

COMMIT = "c0ffee" * 6 + "c0de"


@dataclass
class HubUploads:
    """Started by `with`; holds what was uploaded."""

    token: str
    failures: dict[str, list[int]] = field(default_factory=dict)
    """End of a path -> statuses that the first requests of it get."""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    """Method, path and answered status of every request, in order."""

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        serve = partial(self._server.serve_forever, poll_interval=0.02)
        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """What a client needs to know."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": self.token,
            "NO_PROXY": "127.0.0.1",
        }

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self._answer()

            do_PUT = do_GET = do_POST

            def log_message(self, format: str, *args: object) -> None:
                pass

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.partition("?")[0]
                is_known = self.headers.get("Authorization") == f"Bearer {hub.token}"
                status, answer = 401, {"error": "who are you?"}
                failing = [left for end, left in hub.failures.items() if path.endswith(end)]
                if failing and failing[0]:
                    status, answer = failing[0].pop(0), {"error": "come back later"}
                elif is_known or path.startswith("/lfs/"):
                    status, answer = hub.answer(path, body)
                hub.requests.append(f"{self.command} {path} {status}")
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        return Handler

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of one request."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repositories:
                return 409, {"error": "exists", "url": f"{self.address}/{name}"}
            self.repositories[name] = {}
            return 200, {"url": f"{self.address}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/lfs/"):
            oid = path.removeprefix("/lfs/")
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, {"error": "another file"}
            self.blobs[oid] = body
            return 200, {}
        for suffix, act in (
            ("/preupload/main", self._preupload),
            ("/commit/main", self._commit),
            (".git/info/lfs/objects/batch", self._batch),
        ):
            name = path.removeprefix("/api/models").strip("/").removesuffix(suffix)
            if path.endswith(suffix) and name in self.repositories:
                return 200, act(name, body)
        return 404, {"error": f"no {path}"}

    def _preupload(self, name: str, body: bytes) -> Any:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return {"files": modes}

    def _batch(self, name: str, body: bytes) -> Any:
        objects = [
            {
                **file,
                "actions": {"upload": {"href": f"{self.address}/lfs/{file['oid']}", "header": {}}},
            }
            for file in json.loads(body)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _commit(self, name: str, body: bytes) -> Any:
        files = self.repositories[name]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
        return {
            "commitUrl": f"{self.address}/{name}/commit/{COMMIT}",
            "commitOid": COMMIT,
            "pullRequestUrl": None,
        }
