"""A zoo in an object store or behind SSH, through fsspec: `s3://bucket/prefix`, `gs://bucket/prefix`, `ssh://host/dir`.

Credentials and endpoints come from where the libraries look for them (AWS_*, FSSPEC_S3_*, ~/.ssh). An object appears
whole: stores take a put whole or not at all, over SSH a file is renamed into place. The index is swapped:

    s3      PutObject with If-Match (or If-None-Match: *): the server compares
    ssh     under a folder made as lock (mkdir fails where it exists), compared before writing
    gs      compared before and after writing
"""

import secrets
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vtzoo.catalogue import INDEX, LIMIT_BYTES, Index, dump
from vtzoo.errors import Conflict, NotFound
from vtzoo.files import sha256_bytes
from vtzoo.patience import Dropped
from vtzoo.remotes import object_path, parsed, shown
from vtzoo.remotes._said import needing, status, translated

_PIECE_BYTES = 8 << 20
_LOCK = ".vtzoo/pushing"
_LOCK_S = 30.0
_EXTRAS = {"s3": "s3", "gs": "gs", "gcs": "gs", "ssh": "ssh", "sftp": "ssh"}


def connect(url: str) -> "Bucket":
    """The zoo below a bucket's prefix or in a folder behind SSH."""
    scheme = urlsplit(url).scheme.lower()

    def start() -> Any:
        with needing(_EXTRAS[scheme]), translated(shown(url)):
            if scheme in ("ssh", "sftp"):
                from vtzoo.remotes._ssh import filesystem

                return filesystem(url)
            import fsspec

            return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)

    parts = urlsplit(url)
    root = parts.path if _EXTRAS[scheme] == "ssh" else parts.netloc + parts.path
    return Bucket(start, root.rstrip("/"), shown(url), folders=_EXTRAS[scheme] == "ssh", matches=scheme == "s3")


class Bucket:
    """See the module's docstring.

    Args:
        start: makes the fsspec filesystem, at first use.
        root: the zoo's path in it.
        where: the URL that people see.
        folders: whether it has folders and renames (else a put is whole or nothing).
        matches: whether it compares entity tags when it puts.
    """

    read_only = False
    ranges = True

    def __init__(self, start: Callable[[], Any], root: str, where: str, *, folders: bool, matches: bool) -> None:
        self._start = start
        self._root = root
        self.where = where
        self._folders = folders
        self._matches = matches

    @cached_property
    def _filesystem(self) -> Any:
        return self._start()

    def index(self) -> tuple[Index, str]:
        """What stands in its index; the token is its entity tag as it was before reading, or its digest."""
        try:
            tag = self._tag() if self._matches else ""
            data = self._index_bytes()
        except NotFound:
            return Index(), ""
        return parsed(data, f"{self.where}/{INDEX}"), tag or sha256_bytes(data)

    def size(self, digest: str) -> int | None:
        """As announced."""
        path = object_path(digest)
        with translated(f"{self.where}/{path}"):
            return self._filesystem.info(f"{self._root}/{path}")["size"]

    def stream(self, digest: str, start: int, end: int) -> Iterator[bytes]:
        """Range by range."""
        path = object_path(digest)
        for at in range(start, end, _PIECE_BYTES):
            until = min(at + _PIECE_BYTES, end)
            with translated(f"{self.where}/{path}"):
                piece = self._filesystem.cat_file(f"{self._root}/{path}", start=at, end=until)
            yield piece[: until - at]
            if len(piece) != until - at:
                raise Dropped(f"{self.where} sent {len(piece)} bytes of {until - at}", "try again later")

    def upload(self, digest: str, path: Path) -> None:
        """Send a file under its digest; one that is there with its size is not sent again."""
        size = path.stat().st_size
        with suppress(NotFound):
            if self.size(digest) == size:
                return
        place = f"{self._root}/{object_path(digest)}"
        with translated(self.where), self._arriving(place) as temporary:
            self._filesystem.put_file(str(path), temporary)
        if (seen := self.size(digest)) != size:
            raise Dropped(f"{self.where} has kept {seen} bytes of {size}", "try again")

    def publish(self, index: Index, token: str) -> bool:
        """Swap the index if it is still the version that `token` names."""
        data = dump(index).encode()
        if self._matches:
            return self._put_matching(data, token)
        with self._lock() if self._folders else nullcontext():
            if self._digest() != token:
                return False
            with translated(self.where), self._arriving(f"{self._root}/{INDEX}") as temporary:
                self._filesystem.pipe_file(temporary, data)
            return self._digest() == sha256_bytes(data)

    # -------------------------------------------------------------------------------------------------------- inside
    def _index_bytes(self) -> bytes:
        with translated(f"{self.where}/{INDEX}"):
            return self._filesystem.cat_file(f"{self._root}/{INDEX}", start=0, end=LIMIT_BYTES + 1)

    def _digest(self) -> str:
        try:
            return sha256_bytes(self._index_bytes())
        except NotFound:
            return ""

    def _tag(self) -> str:
        with translated(f"{self.where}/{INDEX}"):
            return self._filesystem.info(f"{self._root}/{INDEX}", refresh=True)["ETag"]

    def _put_matching(self, data: bytes, token: str) -> bool:
        wanted = {"IfMatch": token} if token else {"IfNoneMatch": "*"}
        try:
            self._filesystem.pipe_file(f"{self._root}/{INDEX}", data, **wanted)
        except OSError as error:
            if status(error) in (409, 412):
                return False
            with translated(f"{self.where}/{INDEX}"):
                raise
        return True

    @contextmanager
    def _arriving(self, place: str) -> Generator[str, None, None]:
        """The name to write under: a temporary one that is renamed in the end, where there are folders."""
        if not self._folders:
            yield place
            return
        temporary = f"{place}.{secrets.token_hex(8)}.tmp"
        self._filesystem.makedirs(place.rpartition("/")[0], exist_ok=True)
        try:
            yield temporary
            self._filesystem.mv(temporary, place)
        except BaseException:
            with suppress(Exception):
                self._filesystem.rm_file(temporary)
            raise

    @contextmanager
    def _lock(self) -> Generator[None, None, None]:
        """A folder that only one can make; one left by a killed push is taken after `_LOCK_S`."""
        lock = f"{self._root}/{_LOCK}"
        with translated(self.where):
            self._filesystem.makedirs(f"{self._root}/.vtzoo", exist_ok=True)
        self._wait_for(lock)
        try:
            yield
        finally:
            with suppress(Exception):
                self._filesystem.rmdir(lock)

    def _wait_for(self, lock: str) -> None:
        """Make the lock's folder.

        Raises:
            Conflict: others keep making it.
        """
        for round_ in range(2):
            began = time.monotonic()
            while time.monotonic() - began < _LOCK_S:
                if self._made(lock):
                    return
                time.sleep(0.1)
            if not round_:
                with suppress(OSError):
                    self._filesystem.rmdir(lock)
        raise Conflict(f"{self.where} is being pushed to by others", "try again later")

    def _made(self, lock: str) -> bool:
        try:
            self._filesystem.mkdir(lock, create_parents=False)
        except OSError as error:
            with translated(self.where):
                if not self._filesystem.exists(lock) and not isinstance(error, FileExistsError):
                    raise
            return False
        return True
