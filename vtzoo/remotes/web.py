"""A zoo's folder behind a web server, to read: `https://host/dir`.

Ranges are asked for; a server that knows none is read from the start again. Whatever is sent, no more than what was
announced is taken. A redirect stays with http and https, and never leads from https to http.
"""

import re
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vtzoo import patience
from vtzoo.catalogue import INDEX, LIMIT_BYTES, Index
from vtzoo.errors import Network, NotFound, UsageError
from vtzoo.files import sha256_bytes
from vtzoo.patience import Dropped
from vtzoo.remotes import object_path, parsed, shown
from vtzoo.remotes._said import translated

_PIECE_BYTES = 64 << 10  # more would be lost when a connection breaks: aiohttp buffers twice of it
_CONNECT_S = 10.0
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


def connect(url: str) -> "Web":
    """The zoo behind a URL."""
    return Web(url)


class Web:
    """See the module's docstring."""

    read_only = True

    def __init__(self, url: str) -> None:
        self._root = url.rstrip("/")
        self.where = shown(url)
        self.ranges = True

    def index(self) -> tuple[Index, str]:
        """What stands in its index; the token is the file's digest.

        Raises:
            NotFound: there is no zoo.
        """
        data = bytearray()
        try:
            with self._answer(INDEX) as file:
                while len(data) <= LIMIT_BYTES and (piece := self._read(file)):
                    data += piece
        except NotFound as error:
            raise NotFound(f"{self.where} has no {INDEX}", "check the URL: it is that of a zoo's folder") from error
        return parsed(bytes(data), f"{self.where}/{INDEX}"), sha256_bytes(bytes(data))

    def size(self, digest: str) -> int | None:
        """As the server announces it, asked for the first byte only."""
        with self._answer(object_path(digest), 0, 1) as file:
            return _total(file.r)

    def stream(self, digest: str, start: int, end: int) -> Iterator[bytes]:
        """By one request, from `start` where the server knows ranges."""
        with self._answer(object_path(digest), start, end) as file:
            before = start - _first(file.r)
            left = end - start
            if before < 0:
                raise Dropped(f"{self.where} sends another range than it was asked for", "try again later")
            while left and (piece := self._read(file)):
                taken = piece[before : before + left]
                before -= min(before, len(piece))
                left -= len(taken)
                if taken:
                    yield taken

    def upload(self, digest: str, path: Path) -> None:  # noqa: ARG002 - the protocol's
        """Refused: it can only be read."""
        raise self._read_only()

    def publish(self, index: Index, token: str) -> bool:  # noqa: ARG002 - the protocol's
        """Refused: it can only be read."""
        raise self._read_only()

    def _read_only(self) -> UsageError:
        return UsageError(f"{self.where} can only be read", "push to a folder, ssh://, s3:// or hf://")

    @cached_property
    def _filesystem(self) -> Any:
        import aiohttp
        import fsspec

        limits = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=patience.PATIENCE.stall_s)
        return fsspec.filesystem("http", client_kwargs={"timeout": limits, "trust_env": True}, skip_instance_cache=True)

    @contextmanager
    def _answer(self, path: str, start: int = 0, end: int = 0) -> Generator[Any, None, None]:
        """An open answer, its headers read (`.r` is aiohttp's response)."""
        asked = {"Range": f"bytes={start}-{end - 1}"} if end else {}
        url = f"{self._root}/{path}"
        with translated(f"{self.where}/{path}"):
            file = self._filesystem.open(url, block_size=0, size=1, headers={"Accept-Encoding": "identity", **asked})
        with closing(file):
            self._check_places(file.r)
            if end:
                self.ranges = self.ranges and file.r.status == 206
            yield file

    def _read(self, file: Any) -> bytes:
        with translated(self.where):
            return file.read(_PIECE_BYTES)

    def _check_places(self, response: Any) -> None:
        """Refuse an answer that came, on any leg of its way, from https to http; aiohttp refuses other schemes itself."""
        schemes = [urlsplit(self._root).scheme.lower(), *(r.url.scheme for r in response.history), response.url.scheme]
        if "http" in schemes[schemes.index("https") :] if "https" in schemes else False:
            raise Network(
                f"{self.where} leads from https to {response.url.with_query(None)}", "ask who keeps that server"
            )


def _total(response: Any) -> int | None:
    """The size of the whole file, from Content-Range, else Content-Length."""
    if response.status == 206:
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        return int(found[3]) if found and found[3] != "*" else None
    return response.content_length


def _first(response: Any) -> int:
    """Which byte of the file an answer starts with."""
    found = _RANGE.fullmatch(response.headers.get("Content-Range", "")) if response.status == 206 else None
    return int(found[1]) if found else 0
