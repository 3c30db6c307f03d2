"""What a hub keeps: repositories as commits of files, and its refusals. The server is `hub_server.py`."""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LARGE_BYTES = 10_000_000


@dataclass(frozen=True, slots=True)
class Blob:
    """A file's content; `lfs` as the hub keeps what is large or binary."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        """What Git LFS calls it by."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """What git calls it by."""
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass(slots=True)
class Repo:
    """Commits by id, each a whole tree; branches and tags by name."""

    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, tree: Mapping[str, Blob], branch: str = "main") -> str:
        """Put a tree on top of a branch."""
        told = [branch, self.refs.get(branch, ""), len(self.commits), sorted((p, b.oid) for p, b in tree.items())]
        oid = hashlib.sha1(json.dumps(told).encode()).hexdigest()
        self.commits[oid] = dict(tree)
        self.refs[branch] = oid
        return oid


class Refused(Exception):
    """An answer of the hub that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "", url: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {"error": message, "url": url}
        self.headers = {k.replace("_", "-"): v for k, v in headers.items()}
        self.headers |= ({"X-Error-Code": code} if code else {}) | ({"X-Error-Message": message} if message else {})


def changed(tree: Mapping[str, Blob], lines: list[dict[str, Any]], lfs: Mapping[str, bytes]) -> dict[str, Blob]:
    """A tree after the operations of a commit, a line each."""
    made = dict(tree)
    for line in lines:
        value = line["value"]
        match line["key"]:
            case "file":
                made[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            case "lfsFile":
                if value["oid"] not in lfs:
                    raise Refused(400, message=f"the object of {value['path']} was never uploaded")
                made[value["path"]] = Blob(lfs[value["oid"]], lfs=True)
            case "deletedFile":
                del made[value["path"]]
            case other:
                raise Refused(400, message=f"unknown operation {other}")
    return made


def is_large(path: str, sample: bytes, size: int) -> bool:
    """Whether a file goes to Git LFS: by name, size, or because its start is binary."""
    return path.endswith(".safetensors") or size > _LARGE_BYTES or b"\0" in sample


def told(path: str, blob: Blob) -> dict[str, Any]:
    """A file as the hub lists it."""
    lfs = {"lfs": {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 134}} if blob.lfs else {}
    return {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid, **lfs}
