"""A stand-in for the Hugging Face hub: the few requests that downloads make, served from folders on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """`repos`: ("models" | "datasets", "org/name") -> {revision name: folder}; a commit is the hash of its folder."""

    repos: dict[tuple[str, str], dict[str, Path]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""
    server: ThreadingHTTPServer | None = None

    def close(self) -> None:
        """Go off the air: connections are refused from now on."""
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    def commit(self, folder: Path) -> str:
        digest = hashlib.sha1()
        for file in _files(folder):
            digest.update(file.encode() + (folder / file).read_bytes())
        return digest.hexdigest()

    def find(self, kind: str, name: str, revision: str) -> Path | None:
        revisions = self.repos.get((kind, name), {})
        by_commit = {self.commit(folder): folder for folder in revisions.values()}
        return revisions.get(revision) or by_commit.get(revision)


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a free port, for as long as the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            _answer(hub, self, body=False)

        def do_GET(self) -> None:
            _answer(hub, self, body=True)

        def do_POST(self) -> None:
            _answer(hub, self, body=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.server = server
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.close()


def _answer(hub: Hub, request: BaseHTTPRequestHandler, body: bool) -> None:
    url = urlsplit(request.path)
    path, recursive = unquote(url.path), "recursive=true" in url.query.lower()
    hub.requests.append(f"{request.command} {path}")
    length = int(request.headers.get("Content-Length") or 0)
    posted = request.rfile.read(length)
    parts = path.strip("/").split("/")
    if parts[0] == "api" and len(parts) >= 4:
        kind, name = parts[1], "/".join(parts[2:4])
        what, revision = (parts[4], parts[5]) if len(parts) > 5 else ("revision", "main")
        if (kind, name) not in hub.repos:
            return _send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        folder = hub.find(kind, name, revision)
        if folder is None:
            return _send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        return _json(request, _api(hub, folder, name, what, posted, "/".join(parts[6:]), recursive), body)
    kind = "datasets" if parts[0] == "datasets" else "models"
    parts = parts[1:] if kind == "datasets" else parts
    if len(parts) > 4 and parts[2] == "resolve":
        folder = hub.find(kind, "/".join(parts[:2]), parts[3])
        file = folder / "/".join(parts[4:]) if folder else None
        if folder is None or file is None or not file.is_file():
            return _send(request, 404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": hub.commit(folder)}
        status, wanted = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{len(content)}"
            content = content[first : last + 1]
        return _send(request, status, content, headers, body)
    return _send(request, 404, b"", {}, body)


def _api(hub: Hub, folder: Path, name: str, what: str, posted: bytes, under: str, recursive: bool) -> object:
    def entry(file: str) -> dict[str, object]:
        content = (folder / file).read_bytes()
        return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    if what == "tree":
        top = folder / under
        if recursive:
            return [entry(f) for f in _files(folder) if (folder / f).is_relative_to(top)]
        children = sorted(top.iterdir()) if top.is_dir() else []
        names = [(c, c.relative_to(folder).as_posix()) for c in children]
        return [entry(n) if c.is_file() else {"type": "directory", "path": n, "oid": "0", "size": 0} for c, n in names]
    if what == "paths-info":
        wanted = json.loads(posted)["paths"] if posted.startswith(b"{") else []
        return [entry(f) for f in _files(folder) if f in wanted]
    card = {"license": "apache-2.0"} if (folder / "README.md").exists() else None
    siblings = [{"rfilename": f} for f in _files(folder)]
    return {"_id": "0", "id": name, "sha": hub.commit(folder), "siblings": siblings, "cardData": card, "private": False,
            "tags": [], "downloads": 0, "likes": 0}  # fmt: skip


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _json(request: BaseHTTPRequestHandler, value: object, body: bool) -> None:
    _send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)


def _send(request: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
    request.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(content))}.items():
        request.send_header(name, value)
    request.end_headers()
    if body:
        request.wfile.write(content)
