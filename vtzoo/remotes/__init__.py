"""Zoos elsewhere: a folder, a bucket, a server or a repository with a zoo's own layout, `zoo_index.yaml` and objects.

    URL = path | file:///dir | ssh://host/dir | s3://bucket/prefix | gs://bucket/prefix | https://host/dir | hf://org/name

One module of this package for each kind; each has `connect(url) -> Remote`, which opens no connection yet.
"""

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast
from urllib.parse import urlsplit

from vtzoo.catalogue import Index, parse
from vtzoo.errors import Network, UsageError, did_you_mean
from vtzoo.machine import OFFLINE, offline
from vtzoo.refs import check_digest

_HOST = re.compile(r"(?!file:)[^:/\\.~][^:/\\]+:(?!//)", re.IGNORECASE)  # s3:/bucket, host:/dir; neither ./a:b nor C:
_KINDS = {
    "file": "folder",
    "gcs": "bucket",
    "gs": "bucket",
    "hf": "hub",
    "http": "web",
    "https": "web",
    "s3": "bucket",
    "sftp": "bucket",
    "ssh": "bucket",
}


class Remote(Protocol):
    """What is asked of a zoo elsewhere; nothing that it says is trusted.

    Every method raises `Dropped` (vtzoo/patience.py) where another try is worth it, `NotFound` where what is asked for
    is not there, another VtzooError where no try will help. None of them tries again by itself.

    Attributes:
        where: its URL as people may see it, without passwords.
        read_only: whether `upload` and `publish` are refused by its nature.
        ranges: whether `stream` from a later byte spares those before it; may be learnt with the first answer.
    """

    where: str
    read_only: bool
    ranges: bool

    def index(self) -> tuple[Index, str]:
        """Its entries as they are now, with a token for exactly this version; empty, with "", where none is yet."""
        ...

    def size(self, digest: str) -> int | None:
        """The bytes of an object as announced; None where the server doesn't say."""
        ...

    def stream(self, digest: str, start: int, end: int) -> Iterator[bytes]:
        """Pieces of an object's bytes [start, end), at most so many; it may end early."""
        ...

    def upload(self, digest: str, path: Path) -> None:
        """Send a file, if it is not there whole already; until `publish` it may wait in a staging place."""
        ...

    def publish(self, index: Index, token: str) -> bool:
        """Put an index in the place of the version that `token` names; False where that is no longer the latest."""
        ...


def open_remote(url: str) -> Remote:
    """The remote of a URL or path.

    Raises:
        UsageError: a scheme that has no remotes, or its package is not installed.
        Network: offline, and it is not a folder.
        NotFound: a folder that is no zoo, and not empty.
    """
    if _HOST.match(url):
        hint = "write s3://bucket/prefix or ssh://host/dir, or put ./ before a folder's name"
        raise UsageError(f"'{shown(url)}' reads like a place of another machine", hint)
    scheme = "file" if is_folder(url) else urlsplit(url).scheme.lower()
    if scheme not in _KINDS:
        raise UsageError(f"'{shown(url)}' is no remote", did_you_mean(scheme, _KINDS) or "a folder, s3://…, https://…")
    if scheme != "file" and offline():
        raise Network(f"offline: {shown(url)} is not asked", f"leave --offline out, or unset {' and '.join(OFFLINE)}")
    return cast("Remote", import_module(f"vtzoo.remotes.{_KINDS[scheme]}").connect(url))


def is_folder(url: str) -> bool:
    """Whether a remote is a folder of this machine: a path, or file://."""
    return "://" not in url or url.lower().startswith("file:")


def shown(url: str) -> str:
    """A URL without the password, query and fragment that it may carry."""
    if is_folder(url):
        return url
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user.partition(':')[0]}{at}{host}", query="", fragment="").geturl().rstrip("/")


def object_path(digest: str) -> str:
    """Where an object lies below a zoo's root.

    Raises:
        UsageError: not 64 hex digits.
    """
    return f".vtzoo/objects/sha256/{check_digest(digest)[:2]}/{digest}"


def parsed(data: bytes, where: str) -> Index:
    """An index from elsewhere.

    Raises:
        Corrupt: too large, or no sound index; the message has the line.
        Mismatch: written by a newer vtzoo.
    """
    return parse(data, cast("Path", where))  # only shown
