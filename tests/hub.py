"""A local model hub: enough of the hub's interface for the real client to download from it and push to it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import huggingface_hub.constants
import pytest

LARGE = (".safetensors", ".bin")
"""What the hub keeps as LFS files, which it hands out by a redirect to another host."""


@dataclass
class Repository:
    """Commits of files, and the branches and tags that name them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool | None = None

    def commit(self, files: dict[str, bytes], *names: str) -> str:
        """Keeps `files` as a commit under `names`, and returns its id."""
        digest = hashlib.sha1(repr(sorted((name, sha256(data)) for name, data in files.items())).encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.names.update(dict.fromkeys(names, digest))
        return digest


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    token: str | None
    range: str | None


class Hub:
    """The hub's state, and what was asked of it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.large: dict[str, bytes] = {}
        self.refused: dict[str, int] = {}
        """Status with which requests are answered whose path matches the pattern. The answer echoes the token."""
        self.breaks_after: int | None = None
        """Bytes after which the next large download breaks off."""
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), self.handler()) for _ in range(2)]
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)

    def publish(self, repo_id: str, files: dict[str, bytes], *names: str) -> str:
        """A commit of `files` in a repository, made where it is not there."""
        return self.repositories.setdefault(repo_id, Repository()).commit(files, *(names or ("main",)))

    def asked(self, pattern: str, method: str = "GET") -> list[Request]:
        """The requests so far whose path matches."""
        return [request for request in self.requests if request.method == method and re.search(pattern, request.path)]

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def handler(self) -> type[BaseHTTPRequestHandler]:
        return type("BoundAnswer", (Answer,), {"hub": self})


class Answer(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(
            Request(self.command, path, self.headers.get("Authorization"), self.headers.get("Range"))
        )
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.command != "GET" else b""
        for pattern, status in self.hub.refused.items():
            if re.search(pattern, path):
                sent = f"you sent {self.headers.get('Authorization')}"
                told = {"X-Error-Message": sent, "Content-Type": "application/json"}
                return self.answer(status, json.dumps({"error": f"hf_donottellanyone; {sent}"}).encode(), told)
        for method, pattern, name in ROUTES:
            matched = re.fullmatch(pattern, path)
            if matched and self.command in method.split("|"):
                return getattr(self, name)(*matched.groups())
        return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def json(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def repository(self, repo_id: str) -> Repository | None:
        """The repository, where there is one that the sender may see; else the refusal is sent."""
        found = self.hub.repositories.get(repo_id)
        if found is None:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif found.gated and not self.headers.get("Authorization"):
            self.answer(401, b"", {"X-Error-Code": "GatedRepo"})
            return None
        return found

    # Downloads

    def revision(self, repo_id: str, name: str | None = None) -> None:
        if repository := self.repository(repo_id):
            name = name or "main"
            commit = repository.names.get(name, name)
            if commit not in repository.commits:
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            self.json({"id": repo_id, "sha": commit, "siblings": []})

    def tree(self, repo_id: str, commit: str, folder: str | None) -> None:
        if repository := self.repository(repo_id):
            files = repository.commits[commit].items()
            found = [entry(name, data) for name, data in files if folder is None or name.startswith(f"{folder}/")]
            if folder and not found:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            self.json(found)

    def paths(self, repo_id: str, commit: str) -> None:
        if repository := self.repository(repo_id):
            asked = parse_qs(self.body.decode())["paths"]
            self.json([entry(name, data) for name, data in repository.commits[commit].items() if name in asked])

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        repository = self.repository(repo_id)
        if repository is None:
            return
        commit = repository.names.get(revision, revision)
        data = repository.commits[commit].get(name)
        headers = {"X-Repo-Commit": commit}
        if data is None:
            return self.answer(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        if not name.endswith(LARGE):
            return self.answer(200, data, headers | {"ETag": f'"{sha1(data)}"'})
        self.hub.large[sha256(data)] = data
        link = {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        self.answer(302, b"", headers | link | {"Location": f"{self.hub.storage}/large/{sha256(data)}"})

    def download(self, digest: str) -> None:
        data = self.hub.large[digest]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        cut, self.hub.breaks_after = self.hub.breaks_after, None
        self.answer(206 if start else 200, data[start:], headers, cut)

    # Pushes

    def writer(self) -> bool:
        if self.headers.get("Authorization") == "Bearer hf_writer":
            return True
        self.answer(401 if not self.headers.get("Authorization") else 403)
        return False

    def create(self) -> None:
        if self.writer():
            asked = json.loads(self.body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            if repo_id in self.hub.repositories:
                return self.json({"url": f"{self.hub.endpoint}/{repo_id}"}, 409)
            private = {"private": True, "public": False}.get(asked.get("visibility"))
            self.hub.repositories[repo_id] = Repository(private=private)
            self.hub.repositories[repo_id].commit({}, "main")
            self.json({"url": f"{self.hub.endpoint}/{repo_id}"})

    def branch(self, repo_id: str, name: str) -> None:
        if self.writer() and (repository := self.repository(repo_id)):
            if name in repository.names:
                return self.json({}, 409)
            repository.names[name] = repository.names["main"]
            self.json({})

    def validate(self) -> None:
        self.json({"warnings": [], "errors": []})

    def preupload(self, repo_id: str, name: str) -> None:
        if self.writer() and (repository := self.repository(repo_id)):
            there = repository.commits[repository.names[name]]
            self.json({"files": [{"path": path, "shouldIgnore": False, "oid": entry(path, there[path])["oid"] if path in there else None,
                                  "uploadMode": "lfs" if path.endswith(LARGE) else "regular"}
                                 for path in (asked["path"] for asked in json.loads(self.body)["files"])]})  # fmt: skip

    def batch(self, repo_id: str) -> None:
        if self.writer():
            objects = []
            for asked in json.loads(self.body)["objects"]:
                upload = {"href": f"{self.hub.storage}/upload/{asked['oid']}"}
                verify = {"href": f"{self.hub.endpoint}/{repo_id}/verify"}
                there = asked["oid"] in self.hub.large
                objects.append(asked if there else asked | {"actions": {"upload": upload, "verify": verify}})
            self.json({"transfer": "basic", "objects": objects})

    def upload(self, digest: str) -> None:
        if sha256(self.body) != digest:
            return self.answer(400)
        self.hub.large[digest] = self.body
        self.answer(200)

    def verify(self, repo_id: str) -> None:
        self.answer(200 if json.loads(self.body)["oid"] in self.hub.large else 404)

    def commit(self, repo_id: str, name: str) -> None:
        if self.writer() and (repository := self.repository(repo_id)):
            files = dict(repository.commits[repository.names[name]])
            for line in map(json.loads, self.body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
            digest = repository.commit(files, name)
            self.json(
                {"success": True, "commitOid": digest, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{digest}"}
            )

    def log_message(self, format: str, *args: Any) -> None:
        pass


REPO = r"((?:datasets/)?[^/]+/[^/]+)"
ROUTES = (
    ("GET", rf"/api/(?:models/)?{REPO}", "revision"),
    ("GET", rf"/api/(?:models/)?{REPO}/revision/(.+)", "revision"),
    ("GET", rf"/api/(?:models/)?{REPO}/tree/(\w+)(?:/(.+))?", "tree"),
    ("GET|HEAD", rf"/{REPO}/resolve/(\w+)/(.+)", "resolve"),
    ("GET|HEAD", r"/large/(\w+)", "download"),
    ("POST", rf"/api/{REPO}/paths-info/(\w+)", "paths"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", "branch"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", "preupload"),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/upload/(\w+)", "upload"),
    ("POST", r"/([^/]+/[^/]+)/verify", "verify"),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", "commit"),
)  # fmt: skip


def sha1(data: bytes) -> str:
    """As git names a file's contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def entry(name: str, data: bytes) -> dict[str, Any]:
    """A file in a listing of the hub."""
    found: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": sha1(data)}
    if name.endswith(LARGE):
        found["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
        found["oid"] = sha1(
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(data)}\nsize {len(data)}\n".encode()
        )
    return found


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub that huggingface_hub talks to, with a cache of its own; no token is set.

    The client reads its settings when it is imported, so that they are patched here instead of in the environment.
    Xet is off: it is a service of its own, with a client that is not written in Python.
    """
    hub = Hub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield hub
    hub.close()
