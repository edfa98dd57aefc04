"""A model hub on 127.0.0.1: as much of its protocol as its own client needs to resolve, list and fetch. Counts what is asked."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class FakeHub(ThreadingHTTPServer):
    """One repository. `commits`: commit -> file name -> bytes; `main`: the commit of that branch, which may move."""

    daemon_threads = True

    def __init__(self, repo: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo = repo
        self.commits: dict[str, dict[str, bytes]] = {}
        self.main = ""
        self.fetched: Counter[str] = Counter()  # file -> how often its bytes were sent
        self.requests = 0
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def push(self, files: dict[str, bytes]) -> str:
        """A new commit of main."""
        commit = hashlib.sha1(json.dumps({name: data.hex() for name, data in files.items()}).encode()).hexdigest()
        self.commits[commit], self.main = files, commit
        return commit

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server
        hub.requests += 1
        path = unquote(urlsplit(self.path).path)
        for start in (f"/api/models/{hub.repo}/revision/", f"/api/models/{hub.repo}/tree/", f"/{hub.repo}/resolve/"):
            if path.startswith(start):
                revision, _, name = path.removeprefix(start).partition("/")
                commit = hub.main if revision == "main" else revision
                return self._revision(start, commit, name)
        if path == f"/api/models/{hub.repo}":
            return self._revision(f"/api/models/{hub.repo}/revision/", hub.main, "")
        return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _revision(self, start: str, commit: str, name: str) -> None:
        files = self.server.commits.get(commit)
        if files is None:
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if "/tree/" in start:
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in files.items()
            ]
            return self._answer(200, json.dumps(listed).encode())
        if "/revision/" in start:
            about = {"id": self.server.repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return self._answer(200, json.dumps(about).encode())
        headers = {"X-Repo-Commit": commit}
        if name not in files:
            return self._answer(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        self.server.fetched[name] += self.command == "GET"
        return self._answer(200, files[name], headers | {"ETag": f'"{_oid(files[name])}"'})

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
