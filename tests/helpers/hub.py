"""A Hugging Face hub of files in memory, served on this machine: as much of its interface as downloads need."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_GATED = "gated/model"


class Hub:
    """url: what HF_ENDPOINT is to be; requests: "METHOD path" of all that came."""

    def __init__(self, url: str, requests: list[str]) -> None:
        self.url = url
        self.requests = requests


@contextmanager
def serve_hub(repos: Mapping[str, Mapping[str, bytes]]) -> Iterator[Hub]:
    """Serve repositories, by name their files by name. "gated/model" is one that nobody may read."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *_args: object) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            requests.append(f"{self.command} {path}")
            is_api = path.startswith("/api/models/")
            parts = path.removeprefix("/api/models").strip("/").split("/")
            repo, rest = "/".join(parts[:2]), parts[2:]
            if repo == _GATED:
                self._send(403, b"", {"X-Error-Code": "GatedRepo"}, with_body)
            elif repo not in repos:
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
            elif is_api:
                self._send(200, json.dumps(_listing(repo, repos[repo], rest)).encode(), {}, with_body)
            elif "/".join(rest[2:]) not in repos[repo]:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _COMMIT}, with_body)
            else:
                data = repos[repo]["/".join(rest[2:])]
                etag = hashlib.sha256(data).hexdigest()
                self._send(200, data, {"X-Repo-Commit": _COMMIT, "ETag": f'"{etag}"'}, with_body)

        def _send(self, code: int, body: bytes, headers: Mapping[str, str], with_body: bool) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_port}", requests)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _listing(repo: str, files: Mapping[str, bytes], rest: list[str]) -> object:
    if rest[:1] == ["tree"]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
    return {"id": repo, "sha": _COMMIT, "siblings": [{"rfilename": name} for name in files]}
