"""A folder of this machine or of a mounted disk: a zoo, written through `Zoo` with its lock and its checks."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from vtzoo.catalogue import INDEX, Index, parse
from vtzoo.errors import Conflict, NotFound, UsageError
from vtzoo.files import explained, sha256_bytes
from vtzoo.refs import Entry, expanded
from vtzoo.zoo import Zoo

_PIECE_BYTES = 1 << 20


def connect(url: str) -> "Folder":
    """The zoo in a folder; a folder that is missing or empty becomes one at the first write.

    Raises:
        NotFound: there is something, but no zoo.
        UsageError: a URL of another machine's files.
    """
    path = expanded(_local(url) if url.lower().startswith("file:") else url).absolute()
    begun = (".vtzoo", f".{INDEX}")  # by another, whose index is still to come
    fresh = not path.exists() or (path.is_dir() and all(p.name.startswith(begun) for p in path.iterdir()))
    if not fresh and not (path / INDEX).is_file():
        raise NotFound(f"{path} has no {INDEX}", f"make it a zoo: vtzoo init {path}")
    return Folder(Zoo(path, create=fresh))


def _local(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc.lower() not in ("", "localhost"):
        raise UsageError(f"{url} names a folder of the host '{parts.netloc}'", f"of this one: file:///{url[7:]}")
    return url2pathname(parts.path)


class Folder:
    """See the module's docstring."""

    read_only = False
    ranges = True

    def __init__(self, zoo: Zoo) -> None:
        self.zoo = zoo
        self.where = str(zoo.root)

    def index(self) -> tuple[Index, str]:
        """Its own entries; the token is their digest, empty before there are any."""
        data = self.zoo.index_bytes()
        return (Index(), "") if data is None else (parse(data, self.zoo.root / INDEX), sha256_bytes(data))

    def size(self, digest: str) -> int:
        """Of the file."""
        path = self.zoo.object(digest)
        with explained(path, "read"):
            return path.stat().st_size

    def stream(self, digest: str, start: int, end: int) -> Iterator[bytes]:
        """From the file."""
        path = self.zoo.object(digest)
        with explained(path, "read"), path.open("rb") as file:
            file.seek(start)
            while start < end and (piece := file.read(min(_PIECE_BYTES, end - start))):
                yield piece
                start += len(piece)

    def upload(self, digest: str, path: Path) -> None:
        """Copy; what is there already is trusted only when its digest is right.

        Raises:
            Conflict: the file is not what its name says.
        """
        if (seen := self.zoo.add_object(path)) != digest:
            self.zoo.discard([seen])
            raise Conflict(f"{path} has the digest {seen[:12]}…, not {digest[:12]}…", "see: vtzoo fsck")

    def publish(self, index: Index, token: str) -> bool:
        """Put what is new, entry by entry, each under the zoo's lock: what others add meanwhile stays."""
        before, found = self.index()
        if found != token:
            return False
        try:
            for section, table in index.sections.items():
                for name, facts in table.items():
                    old = before.sections[section].get(name)
                    if old != facts:
                        self.zoo.put(section, name, facts, replace=old is not None and Entry(section, name, old))
        except (Conflict, NotFound):
            if self.index()[1] == token:
                raise  # the lock, a name of the catalogue, or an object that is missing
            return False
        return True
