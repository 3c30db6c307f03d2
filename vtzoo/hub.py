"""Files of the Hugging Face Hub: a revision pinned to its commit, fetched once into the hub's own cache, checked when it arrives.

    source = "hf-hub:" org "/" name [ "@" revision ]

The hub's library does the talking, so its conventions hold: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE,
HF_HUB_DOWNLOAD_TIMEOUT. It compares sizes only (huggingface_hub 2.4, file_download.py); digests are compared here.
"""

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vtzoo import files, machine, talk
from vtzoo.errors import Corrupt, Mismatch, Network, NotFound, Resources, UsageError, VtzooError
from vtzoo.patience import Dropped
from vtzoo.refs import shown

SOURCE = "hf-hub:"
COMMIT = re.compile(r"[0-9a-f]{40}")
MAIN = "main"

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*")
_WORTH_A_WORD_BYTES = 100_000
_ETAG = re.compile(r"[\w-][\w.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_AWAY = "add the weights from a file: vtzoo add backbone NAME --arch ARCH --weights FILE"
_LOGIN = "log in: hf auth login (or set HF_TOKEN)"


def place(text: str, scheme: str = SOURCE) -> tuple[str, str]:
    """The repository and the revision ("" where none stands) that `[hf-hub:]org/name[@revision]` names, or one of another scheme.

    Raises:
        UsageError: it does not read so.
    """
    repo, at, revision = text.removeprefix(scheme).partition("@")
    if not _REPO.fullmatch(repo) or ".." in text or "--" in repo or (at and not _REVISION.fullmatch(revision)):
        hint = f"write {scheme}org/name, or {scheme}org/name@REVISION"
        raise UsageError(f"{shown(text)} names no repository of the hub", hint)
    return repo, revision


def pinned(source: str, path: Path) -> str:
    """A source with the commit that its file in the hub's cache was fetched from; sources of other kinds as they are."""
    if not source.startswith(SOURCE) or not COMMIT.fullmatch(path.parent.name):
        return source
    return f"{SOURCE}{place(source)[0]}@{path.parent.name}"


def fetch(source: str, file: str, digest: str = "") -> Path:
    """A repository's file in the hub's cache, fetched into it unless it is there.

    A branch or tag is asked for its commit each time; without a connection, the one last fetched stands for it.

    Args:
        source: `hf-hub:org/name[@revision]`.
        file: its name there.
        digest: the sha256 that it must have; "" where none is known.

    Raises:
        NotFound: no such repository, revision or file.
        Network: it can't be reached, or what came was cut short.
        Mismatch: it has another digest.
        Corrupt: it was damaged on the way.
        Resources: the disk has no room for it.
        UsageError: the source does not read as one.
    """
    from huggingface_hub import constants

    repo, revision = place(source)
    with files.writing(Path(constants.HF_HUB_CACHE)), explained(repo, revision):
        kept = _kept(repo, file, revision)
        if kept is not None and (COMMIT.fullmatch(revision) or machine.offline()):
            return _known(kept, digest, source)
        if machine.offline():
            raise Network(f"{repo} is not in the hub's cache, and this is offline", f"go online, or {_AWAY}")
        said = _told_or_away(repo, file, revision)
        if said is None:
            if kept is None:
                raise Network(f"the hub can't be reached for {repo}", f"connect and repeat, or {_AWAY}")
            talk.say(f"the hub can't be reached: {repo} is taken as it was fetched last")
            return _known(kept, digest, source)
        if (there := _kept(repo, file, said.commit_hash)) is not None:
            return _known(there, digest, source)
        return _fetched(repo, file, revision, said, digest)


def licence(source: str) -> str:
    """What a repository's own card says of its licence; "" where it says nothing, or there is no connection to ask.

    Raises:
        NotFound: no such repository or revision.
    """
    from huggingface_hub import HfApi, constants

    if machine.offline():
        return ""
    repo, revision = place(source)
    with explained(repo, revision):
        card = HfApi().model_info(repo, revision=revision or None, timeout=constants.HF_HUB_ETAG_TIMEOUT).card_data
    found = getattr(card, "license", None)
    return found if isinstance(found, str) else ""


def told(repo: str, file: str, revision: str = "") -> Any:
    """What the hub says of a file, in the hub's library's words: `commit_hash`, `etag` and `size` in bytes; for use within `explained`.

    Raises:
        Network: that is no hub.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repo, file, revision=revision or MAIN)
    said = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if not (COMMIT.fullmatch(said.commit_hash or "") and _ETAG.fullmatch(said.etag or "")):  # names of files, soon
        raise Network(f"{url} is answered by something that is no hub", "is HF_ENDPOINT, or a proxy, set wrongly?")
    return said


@contextmanager
def explained(repo: str, revision: str = "") -> Generator[None, None, None]:
    """Turn what the hub's library raises into refusals; files of our own disk are the caller's to explain."""
    try:
        yield
    except VtzooError:
        raise
    except Exception as error:
        inner = error.__cause__ if type(error) is RuntimeError and isinstance(error.__cause__, Exception) else error
        refusal = _refusal(inner, repo, revision)  # of an upload the library tells the reason only as the cause
        if refusal is None:
            raise
        raise refusal from error


def size(count: int | None) -> str:
    """Bytes for people, in powers of ten: 88.2 MB."""
    if count is None:
        return "of unknown size"
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"


def _kept(repo: str, file: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file, revision=revision or MAIN)
    return Path(found) if isinstance(found, str) else None


def _told_or_away(repo: str, file: str, revision: str) -> Any | None:
    try:
        return told(repo, file, revision)
    except Exception as error:
        if _unreachable(error):
            return None
        raise


def _fetched(repo: str, file: str, revision: str, said: Any, digest: str) -> Path:
    """Fetch what is not there yet; say how much, and look at what came before anybody uses it."""
    from huggingface_hub import constants, hf_hub_download

    cache = Path(constants.HF_HUB_CACHE)
    if said.size is not None and said.size > (free := machine.free_bytes(cache)):
        lacking = f"{repo} needs {size(said.size)}, the disk of {cache} has {size(free)} left"
        raise Resources(lacking, "free some space, or set HF_HUB_CACHE to a folder on another disk")
    if said.size is None or said.size >= _WORTH_A_WORD_BYTES:
        talk.say(f"fetching {repo}@{said.commit_hash[:7]}, {file}: {size(said.size)}")
    path = Path(hf_hub_download(repo, file, revision=revision or MAIN))
    seen, announced = files.sha256(path), _announced(path, said)
    if announced and seen != announced:
        _drop(path)
        raise Corrupt(f"{file} of {repo} arrived damaged ({seen[:12]}…, not {announced[:12]}…)", "repeat the command")
    return _same(path, seen, digest, repo)


def _announced(path: Path, said: Any) -> str:
    """The sha256 that the hub told of a large file: its etag, which the cache makes its name where the system has links.

    "" where none is told, or the branch has moved on between question and download.
    """
    name = path.resolve().name
    name = said.etag if name == path.name and path.parent.name == said.commit_hash else name
    return name if _SHA256.fullmatch(name) else ""


def _known(path: Path, digest: str, source: str) -> Path:
    """A file of the cache; its content's digest is its blob's name, unless the system has no links."""
    if not digest:
        return path
    name = path.resolve().name
    return _same(path, name if _SHA256.fullmatch(name) else files.sha256(path), digest, source)


def _same(path: Path, seen: str, digest: str, where: str) -> Path:
    if digest and seen != digest:
        said = f"{path.name} of {where} is not the one that was known ({seen[:12]}…, not {digest[:12]}…)"
        raise Mismatch(said, "name the revision that had it: hf-hub:org/name@COMMIT, or bring the file back")
    return path


def _drop(path: Path) -> None:
    """Take a damaged file out of the cache, or it would count as fetched."""
    blob = path.resolve()
    for name in (path, blob):
        with suppress(OSError):
            name.unlink()


def _refusal(error: Exception, repo: str, revision: str) -> VtzooError | None:
    """Ours for what the hub's library raised; None when it is not about the hub."""
    from huggingface_hub import errors

    where = f"{repo}@{revision}" if revision else repo
    kinds: tuple[tuple[type[Exception], Callable[[], VtzooError]], ...] = (
        (errors.HFValidationError, lambda: UsageError(f"{shown(repo)} names no repository of the hub", "write org/name")),
        (errors.GatedRepoError, lambda: Network(f"{repo} is gated: its owner must let you in", f"ask on its page, then {_LOGIN}")),
        (errors.RepositoryNotFoundError, lambda: NotFound(f"the hub shows no repository {repo}", f"check the name; for a private one {_LOGIN}")),
        (errors.RevisionNotFoundError, lambda: NotFound(f"{repo} has no revision {shown(revision or MAIN)}", "name a branch, a tag or a commit")),
        (errors.LocalEntryNotFoundError, lambda: Dropped(f"{where} could not be fetched from the hub: {_why(error)}", f"connect and repeat, or {_AWAY}")),
        (errors.EntryNotFoundError, lambda: NotFound(f"{where} has no such file: {_file(error)}", "see on its page what it holds")),
        (errors.HfHubHTTPError, lambda: _answered(error, where)),
    )  # fmt: skip
    for kind, refusal in kinds:
        if isinstance(error, kind):
            return refusal()
    if isinstance(error, ValueError):  # README metadata that it doesn't take, or an answer that is no JSON
        said = f"the hub and {where} don't go together: {' '.join(str(error).split())}"
        return Network(said, "is HF_ENDPOINT, or a proxy, set wrongly?")
    if _unreachable(error) or (isinstance(error, OSError) and error.errno is None):
        return Dropped(f"{where} could not be fetched from the hub: {_why(error)}", "connect and repeat the command")
    return None


def _answered(error: Any, where: str) -> VtzooError:
    """A refusal that the hub answered with."""
    status, why = int(getattr(error.response, "status_code", 0)), error.server_message or _why(error)
    if status in (401, 403):
        return Network(f"the hub does not let you at {where} ({status}): {why}", _LOGIN)
    if status == 429 or status >= 500:
        return Dropped(f"the hub can't serve {where} now ({status})", "repeat the command in a while")
    return Network(f"the hub refused {where} ({status}): {why}", "repeat, or look at its page")


def _unreachable(error: Exception) -> bool:
    """Whether a connection failed, in the words of whichever HTTP library the hub's own uses, by names of its classes."""
    names = {c.__name__ for c in type(error).__mro__}
    return bool(names & {"TransportError", "RequestException", "ConnectionError", "TimeoutError"}) and not (
        names & {"HfHubHTTPError", "HTTPStatusError"}
    )


def _why(error: BaseException) -> str:
    """The first thing that it says, of what caused it where that is known."""
    while error.__cause__ is not None and not str(error.__cause__).startswith("Client error"):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _file(error: BaseException) -> str:
    return str(getattr(getattr(getattr(error, "response", None), "url", None), "path", "")).rpartition("/")[2]
