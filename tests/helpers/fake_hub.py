"""A model hub on loopback: as much of the Hugging Face hub's HTTP as its own client needs to fetch a repository."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self


class FakeHub:
    """Serves repositories (id → revision → folder) from `with` on; `requests` lists the paths that were asked for."""

    def __init__(self, repositories: dict[str, dict[str, Path]]) -> None:
        self.repositories = repositories
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self, with_body=True)

            def do_HEAD(self) -> None:
                hub._answer(self, with_body=False)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to use this hub and an empty cache under `home`."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}

    def _answer(self, handler: BaseHTTPRequestHandler, with_body: bool) -> None:
        path = handler.path.partition("?")[0]
        self.requests.append(path)
        for name, revisions in self.repositories.items():
            if path.startswith(f"/api/models/{name}/revision/"):
                return self._describe(handler, name, revisions, path.rpartition("/")[2])
            if path.startswith(f"/api/models/{name}/tree/"):
                return self._list(handler, revisions, path.rpartition("/")[2])
            if path.startswith(f"/{name}/resolve/"):
                revision, _, file = path.removeprefix(f"/{name}/resolve/").partition("/")
                return self._file(handler, revisions, revision, file, with_body)
        self._refuse(handler, "RepoNotFound")

    def _describe(self, handler: BaseHTTPRequestHandler, name: str, revisions: dict[str, Path], revision: str) -> None:
        if revision not in revisions:
            return self._refuse(handler, "RevisionNotFound")
        siblings = [{"rfilename": file.name} for file in sorted(revisions[revision].iterdir())]
        body = json.dumps({"id": name, "modelId": name, "sha": _commit(revision), "siblings": siblings}).encode()
        self._send(handler, {"Content-Type": "application/json"}, body, True)

    def _list(self, handler: BaseHTTPRequestHandler, revisions: dict[str, Path], revision: str) -> None:
        for known, folder in revisions.items():
            if revision in (known, _commit(known)):
                entries = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _etag(file.read_bytes())}
                    for file in sorted(folder.iterdir())
                ]
                return self._send(handler, {"Content-Type": "application/json"}, json.dumps(entries).encode(), True)
        self._refuse(handler, "RevisionNotFound")

    def _file(
        self, handler: BaseHTTPRequestHandler, revisions: dict[str, Path], revision: str, file: str, with_body: bool
    ) -> None:
        for known, folder in revisions.items():
            if revision in (known, _commit(known)) and (folder / file).is_file():
                body = (folder / file).read_bytes()
                headers = {"ETag": f'"{_etag(body)}"', "X-Repo-Commit": _commit(known)}
                return self._send(handler, headers, body, with_body)
        self._refuse(handler, "EntryNotFound")

    def _refuse(self, handler: BaseHTTPRequestHandler, code: str) -> None:
        handler.send_response(401 if code == "RepoNotFound" else 404)  # the hub does not tell private from absent
        handler.send_header("X-Error-Code", code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def _send(self, handler: BaseHTTPRequestHandler, headers: dict[str, str], body: bytes, with_body: bool) -> None:
        handler.send_response(200)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if with_body:
            handler.wfile.write(body)


def _etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


def _commit(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()
