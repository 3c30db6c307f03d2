"""A server on loopback that speaks the Hugging Face Hub's HTTP API, as far as huggingface_hub (2.4) uses it for models.

Repositories live in memory as commits of files. Large files are answered with a redirect to another origin (`localhost` beside
`127.0.0.1`), as the hub sends one to its CDN. Uploads go by Git LFS; the hub's own Xet storage is not spoken: a client with
hf_xet takes it for every upload without asking, so HF_HUB_DISABLE_XET must be set.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from tests.hub_repos import Blob, Refused, Repo, changed, is_large, told

PART_BYTES = 1 << 20
"""LFS uploads above this size are asked for in parts."""

_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as it was answered; sizes are of bodies, in bytes."""

    method: str
    path: str
    status: int
    received: int
    sent: int
    host: str
    authorization: str


class Hub(ThreadingHTTPServer):
    """The server and all that it keeps.

    Attributes:
        token: what writing takes, and what reading takes where one is sent; None for any.
        fault: changes what a large file's download sends, or None.
        silent: the next commit is made, and its answer lost.
        before_commit: called once, before the next commit is looked at: a chance to be faster.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.seen: list[Seen] = []
        self.token: str | None = None
        self.fault: Callable[[bytes], bytes] | None = None
        self.silent = False
        self.before_commit: Callable[[], None] | None = None
        self.lock = threading.RLock()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self) -> str:
        """The other origin, where large files are."""
        return f"http://localhost:{self.server_port}"

    def add(self, repo: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Commit files over those that are there; gives the commit."""
        mine = self.repos.setdefault(repo, Repo())
        tree = dict(mine.commits.get(mine.refs.get(branch, ""), {}))
        return mine.commit(tree | {p: Blob(d, is_large(p, d[:512], len(d))) for p, d in files.items()}, branch)

    def moved(self, part: str = "") -> int:
        """Bytes of bodies that went either way in requests whose path has this in it."""
        return sum(s.received + s.sent for s in self.seen if part in s.path)

    def asked(self, part: str = "") -> list[str]:
        """Requests whose path has this in it, as `GET /path`."""
        return [f"{s.method} {s.path}" for s in self.seen if part in s.path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no failure of a test."""


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub, for as long as the block lasts."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def use(hub: Hub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Point the hub's library in this process at a server, with a cache of its own; it read its variables when it was loaded."""
    from huggingface_hub import constants

    for name in ("HF_HUB_OFFLINE", "VTZOO_OFFLINE", "HF_TOKEN"):
        patch.delenv(name, raising=False)
    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Say nothing."""

    def _serve(self) -> None:
        self.body = self._received()
        path = unquote(urlsplit(self.path).path)
        if "/commit/" in path and (rival := self.server.before_commit):
            self.server.before_commit = None
            rival()
        try:
            with self.server.lock:
                answer, data = self._route(path)
        except Refused as refusal:
            self._answer(refusal.status, json.dumps(refusal.body).encode(), refusal.headers)
            return
        if self.server.silent and "/commit/" in path:
            self.server.silent, self.close_connection = False, True
        elif isinstance(data, bytes):
            self._file(data, answer)
        else:
            self._answer(
                int(answer.pop("status", 200)),
                json.dumps(data).encode(),
                {"Content-Type": "application/json", **answer},
            )

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815 - the base's names

    def _received(self) -> bytes:
        """The body, also one sent in chunks, as parts of uploads are."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _route(self, path: str) -> tuple[dict[str, Any], Any]:
        for method, pattern, act in _ROUTES:
            if self.command in method.split() and (found := re.fullmatch(pattern, path)):
                return act(self, **found.groupdict())
        raise Refused(404, message=f"this hub has no {self.command} {path}")

    def _file(self, data: bytes, headers: dict[str, Any]) -> None:
        """Send a file or the range of it that was asked for."""
        status = int(headers.pop("status", 200))
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if status != 200 or not asked:
            self._answer(status, data, {"Accept-Ranges": "bytes", **headers})
            return
        start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        if start >= len(data):
            self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        self._answer(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def _answer(self, status: int, data: bytes, headers: Mapping[str, Any]) -> None:
        sent = b"" if self.command == "HEAD" else data
        if self.server.fault and self.command == "GET" and self.path.startswith("/cdn/"):
            sent = self.server.fault(sent)
        said = (self.headers.get("Host") or "", self.headers.get("Authorization") or "")
        self.server.seen.append(Seen(self.command, self.path, status, len(self.body), len(sent), *said))
        with suppress(ConnectionError):
            self.send_response(status)
            for name, value in {"Content-Length": len(data), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(sent)
        if len(sent) < len(data) and self.command != "HEAD":
            self.close_connection = True

    # ------------------------------------------------------------------------------------------------------- reading
    def _repo(self, name: str) -> Repo:
        said = self.headers.get("Authorization")
        if said and self.server.token and said != f"Bearer {self.server.token}":
            raise Refused(401, message="Invalid credentials in Authorization header")
        repo = self.server.repos.get(name)
        if repo is None:
            raise Refused(401, "RepoNotFound", "Repository not found")
        if repo.gated:
            raise Refused(403, "GatedRepo", f"Access to model {name} is restricted")
        return repo

    def _tree(self, name: str, revision: str) -> tuple[str, dict[str, Blob]]:
        repo = self._repo(name)
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repo.commits[oid]

    def resolve(self, repo: str, revision: str, path: str) -> tuple[dict[str, Any], Any]:
        """A file, or where a large one is."""
        oid, tree = self._tree(repo, revision)
        if path not in tree:
            raise Refused(404, "EntryNotFound", "Entry not found", X_Repo_Commit=oid)
        blob = tree[path]
        if not blob.lfs:
            return {"ETag": f'"{blob.oid}"', "X-Repo-Commit": oid}, blob.data
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": len(blob.data), "X-Repo-Commit": oid}
        return {"status": 302, "Location": f"{self.server.storage}/cdn/{repo}/{blob.sha256}", **linked}, b""

    def cdn(self, repo: str, sha256: str) -> tuple[dict[str, Any], Any]:
        """A large file's content."""
        every = (b for tree in self.server.repos[repo].commits.values() for b in tree.values())
        data = next(b.data for b in every if b.lfs and b.sha256 == sha256)
        return {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}, data

    def info(self, repo: str, revision: str | None = None) -> tuple[dict[str, Any], Any]:
        """What a repository is at a revision."""
        oid, tree = self._tree(repo, revision or "main")
        found = re.match(rb"---\n(.*?)\n---", tree["README.md"].data, re.DOTALL) if "README.md" in tree else None
        card = yaml.safe_load(found[1]) if found else None
        return {}, {"id": repo, "sha": oid, "siblings": [{"rfilename": p} for p in tree], "cardData": card, "tags": []}

    def tree(self, repo: str, revision: str, folder: str | None = None) -> tuple[dict[str, Any], Any]:
        """Every file below a folder."""
        _, tree = self._tree(repo, revision)
        return {}, [told(p, b) for p, b in sorted(tree.items()) if p.startswith(f"{folder}/" if folder else "")]

    # ------------------------------------------------------------------------------------------------------- writing
    def _may_write(self) -> None:
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            raise Refused(401, message="Invalid username or password.")

    def create(self) -> tuple[dict[str, Any], Any]:
        """A new repository, with the first commit that the hub makes in it."""
        self._may_write()
        said = json.loads(self.body)
        name = f"{said['organization']}/{said['name']}"
        if name in self.server.repos:
            raise Refused(409, message="You already created this model repo", url=f"{self.server.endpoint}/{name}")
        self.server.add(name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return {}, {"url": f"{self.server.endpoint}/{name}", "name": name, "id": name}

    def validate(self) -> tuple[dict[str, Any], Any]:
        """Whether a README's front matter is YAML, with a licence that the hub has a word for."""
        content = json.loads(self.body)["content"]
        found = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        card = yaml.safe_load(found[1]) if found else {}
        wrong = [] if isinstance(card, dict) and card.get("license", "other").islower() else [{"message": '"license"'}]
        return {"status": 400 if wrong else 200}, {"errors": wrong, "warnings": []}

    def preupload(self, repo: str, revision: str) -> tuple[dict[str, Any], Any]:
        """How each file is to come, and what stands in its place."""
        self._may_write()
        _, tree = self._tree(repo, revision)
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if is_large(f["path"], base64.b64decode(f["sample"]), f["size"]) else "regular",
                "shouldIgnore": False,
                "oid": (tree[f["path"]].sha256 if tree[f["path"]].lfs else tree[f["path"]].oid)
                if f["path"] in tree
                else None,
            }
            for f in json.loads(self.body)["files"]
        ]
        return {}, {"files": files}

    def batch(self, repo: str) -> tuple[dict[str, Any], Any]:
        """Where large files go; nowhere when they are there already."""
        self._may_write()
        found = [{k: o[k] for k in ("oid", "size")} for o in json.loads(self.body)["objects"]]
        return {}, {"transfer": "basic", "objects": [o | self._actions(repo, **o) for o in found]}

    def _actions(self, repo: str, oid: str, size: int) -> dict[str, Any]:
        if oid in self.server.lfs:
            return {}
        where = f"{self.server.storage}/lfs/{oid}"
        upload: dict[str, Any] = {"href": where}
        if size > PART_BYTES:
            numbers = range(1, -(-size // PART_BYTES) + 1)
            upload["href"] = f"{where}/complete"
            upload["header"] = {"chunk_size": str(PART_BYTES)} | {str(n): f"{where}/{n}" for n in numbers}
        return {"actions": {"upload": upload, "verify": {"href": f"{self.server.endpoint}/{repo}/verify"}}}

    def put(self, oid: str, part: str | None = None) -> tuple[dict[str, Any], Any]:
        """A large file, or a part of one."""
        if part is None:
            self.server.lfs[oid] = self.body
        else:
            self.server.parts[oid, int(part)] = self.body
        return {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}, b""

    def complete(self, oid: str) -> tuple[dict[str, Any], Any]:
        """The parts of a large file together."""
        parts = [self.server.parts.pop((oid, p["partNumber"])) for p in json.loads(self.body)["parts"]]
        self.server.lfs[oid] = b"".join(parts)
        return {}, {}

    def verify(self, repo: str) -> tuple[dict[str, Any], Any]:
        """Whether a large file came as it was announced."""
        said = json.loads(self.body)
        data = self.server.lfs.get(said["oid"], b"")
        if len(data) != said["size"] or hashlib.sha256(data).hexdigest() != said["oid"]:
            self.server.lfs.pop(said["oid"], None)
            raise Refused(400, message="the object is not what was announced")
        return {}, {}

    def commit(self, repo: str, revision: str) -> tuple[dict[str, Any], Any]:
        """Files changed all at once, unless somebody was faster than the parent that the client names."""
        self._may_write()
        mine = self._repo(repo)
        oid, tree = self._tree(repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        if lines[0]["value"].get("parentCommit", oid) != oid:
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        made = mine.commit(changed(tree, lines[1:], self.server.lfs), revision)
        return {}, {"success": True, "commitOid": made, "commitUrl": f"{self.server.endpoint}/{repo}/commit/{made}"}


_ROUTES: tuple[tuple[str, str, Callable[..., tuple[dict[str, Any], Any]]], ...] = (
    ("GET HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("GET HEAD", rf"/cdn/{_REPO}/(?P<sha256>[0-9a-f]+)", _Handler.cdn),
    ("GET", rf"/api/models/{_REPO}", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("POST", rf"/{_REPO}/verify", _Handler.verify),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?", _Handler.put),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", _Handler.complete),
)
