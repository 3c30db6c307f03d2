"""A repository of the Hugging Face Hub as a zoo: hf://org/name[@revision].

It holds a zoo's index and objects, and a README whose front matter says what the entries are. A push is one commit on top of
the one that was read, so that index and objects come together or not at all, and nobody's entry is lost. All that a pull reads
is of one commit. The hub's library does the talking: HF_ENDPOINT, HF_TOKEN and the like hold.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vtzoo import hub, hub_card, talk
from vtzoo.catalogue import INDEX, LIMIT_BYTES, Index, dump
from vtzoo.errors import NotFound, UsageError
from vtzoo.refs import Entry
from vtzoo.remotes import object_path, parsed

SCHEME = "hf://"
README = "README.md"
_README_LIMIT_BYTES = 1 << 20
_OUTRUN = frozenset({409, 412})
"""What the hub answers when the branch has another head than the parent that a commit names, or is being written."""


def connect(url: str) -> "Repository":
    """The repository that a URL names.

    Raises:
        UsageError: it names none.
    """
    return Repository(*hub.place(SCHEME + url[len(SCHEME) :].rstrip("/"), SCHEME))


class Repository:
    """See the module's docstring.

    Args:
        repo: org/name.
        revision: a branch, a tag or a commit; "" for the main branch.
    """

    ranges = True

    def __init__(self, repo: str, revision: str = "") -> None:
        self.where = f"{SCHEME}{repo}@{revision}" if revision else f"{SCHEME}{repo}"
        self.read_only = bool(hub.COMMIT.fullmatch(revision))
        self._repo, self._revision = repo, revision
        self._commit = ""
        self._before = Index()
        self._staged: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------------------------- reading
    def index(self) -> tuple[Index, str]:
        """The entries of the commit that the revision means now, and that commit: from now on all is read from it."""
        self._commit, self._before = self._head(), Index()
        if data := self._whole(INDEX, LIMIT_BYTES + 1):
            self._before = parsed(data, self.where)
        return Index({s: dict(table) for s, table in self._before.sections.items()}), self._commit

    def size(self, digest: str) -> int | None:
        """As the hub announces it.

        Raises:
            NotFound: it isn't there.
        """
        found = self._listed(object_path(digest))
        if found is None:
            raise NotFound(f"{self.where} has no object {digest[:12]}…", "push the entry again from where it is whole")
        return found.size

    def stream(self, digest: str, start: int, end: int) -> Iterator[bytes]:
        """Pieces of an object, asked for as a range."""
        return self._bytes(object_path(digest), start, end)

    # ------------------------------------------------------------------------------------------------------- writing
    def upload(self, digest: str, path: Path) -> None:
        """Send a large file to the hub's storage, where it waits for the commit; small ones go with the commit itself.

        Raises:
            Network: the hub does not let us write there.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        place = object_path(digest)
        if place in self._staged or (self._commit and self._holds(place, digest, path)):
            return
        self._make()
        made = CommitOperationAdd(path_in_repo=place, path_or_fileobj=str(path))
        with self._explained():
            HfApi().preupload_lfs_files(self._repo, [made], revision=self._revision or None, free_memory=False)
        self._staged[place] = made

    def publish(self, index: Index, token: str) -> bool:
        """Commit the index, a README for it and what was uploaded, on top of the commit `token`.

        Raises:
            UsageError: the revision is a commit, to which nothing can be added.
            Network: the hub does not let us write there.
        """
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.errors import HfHubHTTPError

        if self.read_only:
            raise UsageError(f"{self.where} is a commit: nothing can be added to it", f"push to {SCHEME}{self._repo}")
        parent = token or self._make()
        if not parent:
            return False
        content = {INDEX: dump(index), README: self._readme(index)}
        made = [CommitOperationAdd(path_in_repo=p, path_or_fileobj=t.encode()) for p, t in content.items()]
        about: dict[str, Any] = {
            "commit_message": self._message(index),
            "parent_commit": parent,
            "revision": self._revision or None,
        }
        with self._explained():
            try:
                done = HfApi().create_commit(self._repo, [*self._staged.values(), *made], **about)
            except HfHubHTTPError as error:
                if error.response.status_code in _OUTRUN:
                    return False
                raise
        self._commit, self._before = done.oid, index
        self._staged.clear()
        return True

    # -------------------------------------------------------------------------------------------------------- inside
    def _explained(self) -> AbstractContextManager[None]:
        return hub.explained(self._repo, self._revision)

    def _head(self) -> str:
        """The commit that the revision means now; "" where there is no repository.

        Raises:
            NotFound: the repository has no such revision.
        """
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        with self._explained():
            try:
                info = HfApi().model_info(
                    self._repo, revision=self._revision or None, expand=["sha"], timeout=constants.HF_HUB_ETAG_TIMEOUT
                )
            except RepositoryNotFoundError as error:
                if isinstance(error, GatedRepoError):
                    raise
                talk.say(
                    f"the hub shows no repository {self._repo}; a private one takes a token (HF_TOKEN, hf auth login)"
                )
                return ""
        return info.sha or ""

    def _make(self) -> str:
        """Make the repository where there was none; its first commit, or "" when somebody has put an index there meanwhile."""
        from huggingface_hub import HfApi

        if self._commit:
            return self._commit
        with self._explained():
            HfApi().create_repo(self._repo, private=True, exist_ok=True)
        found, _ = self.index()
        if any(found.sections.values()):
            return ""
        talk.say(f"made {self.where}, which only you can see; its page on the hub opens it to others")
        return self._commit

    def _listed(self, path: str) -> Any | None:
        """What the hub says of a file at the commit that is read; None when it isn't there."""
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

        with self._explained():
            try:
                return hub.told(self._repo, path, self._commit or self._revision)
            except (EntryNotFoundError, RepositoryNotFoundError):
                return None

    def _holds(self, place: str, digest: str, path: Path) -> bool:
        """Whether an object is there whole: of a large file the hub tells the sha256, of a small one the size has to do."""
        found = self._listed(place)
        return found is not None and (
            found.etag == digest or (len(found.etag) != len(digest) and found.size == path.stat().st_size)
        )

    def _whole(self, path: str, limit_bytes: int) -> bytes:
        """A small file; empty where it isn't there."""
        try:
            return b"".join(self._bytes(path, 0, limit_bytes)) if self._commit else b""
        except NotFound:
            return b""

    def _bytes(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """A range of a file, at the commit that is read; a server that knows no ranges sends what comes before, too."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self._repo, path, revision=self._commit or self._revision or None)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
        wait_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with self._explained(), get_session().stream("GET", url, headers=headers, timeout=wait_s) as answer:
            hf_raise_for_status(answer)
            at = start if answer.status_code == 206 else 0
            for piece in answer.iter_bytes():  # as they come: collecting larger ones would lose them when it breaks
                if wanted := piece[max(0, start - at) : max(0, end - at)]:
                    yield wanted
                at += len(piece)
                if at >= end:
                    return

    def _readme(self, index: Index) -> str:
        old = self._whole(README, _README_LIMIT_BYTES).decode(errors="replace")
        return hub_card.readme(old, self._repo, _entries(index), _entries(self._before))

    def _message(self, index: Index) -> str:
        """What a commit adds or changes, by name."""
        old = {(e.section, e.name): e.facts for e in _entries(self._before)}
        new = [e.name for e in _entries(index) if old.get((e.section, e.name)) != e.facts]
        return f"{', '.join(new[:3])}{f' and {len(new) - 3} more' if new[3:] else ''}" or "Entries removed"


def _entries(index: Index) -> list[Entry]:
    return [Entry(s, name, facts) for s, table in index.sections.items() for name, facts in table.items()]
