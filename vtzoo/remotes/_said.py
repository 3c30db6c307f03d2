"""What servers and their libraries raise, as refusals: worth another try, or not."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from vtzoo.errors import Network, NotFound, UsageError, VtzooError
from vtzoo.patience import Dropped

_LIBRARIES = frozenset({"aiobotocore", "aiohttp", "asyncio", "botocore", "fsspec", "gcsfs", "google", "paramiko"})
_PASSING = frozenset({408, 409, 425, 429})


@contextmanager
def translated(where: str) -> Generator[None, None, None]:
    """Turn what a server or a library says into ours; a bug passes through.

    Raises:
        NotFound: it is not there.
        VtzooError: no permission.
        Network: refused for good.
        Dropped: anything that may pass.
    """
    try:
        yield
    except VtzooError:
        raise
    except Exception as error:
        refusal = _refusal(error, where)
        if refusal is None:
            raise
        raise refusal from error


@contextmanager
def needing(extra: str) -> Generator[None, None, None]:
    """Say which extra brings a package that is missing."""
    try:
        yield
    except ImportError as error:
        raise UsageError(f"this remote needs a package that is not installed ({error})", f"pip install 'vtzoo[{extra}]'") from error  # fmt: skip


def status(error: BaseException) -> int:
    """The HTTP status behind an error of aiohttp, or of s3fs (which keeps botocore's as the cause); 0 where none is."""
    answer: Any = getattr(error.__cause__, "response", None) or getattr(error, "response", None) or {}
    found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
    return int(found or getattr(error, "status", 0) or 0)


def _refusal(error: Exception, where: str) -> VtzooError | None:
    said = _printable(str(error) or type(error).__name__)
    code, kind = status(error), type(error).__name__
    if isinstance(error, FileNotFoundError) or code == 404:
        return NotFound(f"{where} does not exist", "check the URL; see what is there with: vtzoo ls URL")
    if (
        isinstance(error, PermissionError)
        or code in (401, 403)
        or kind in ("NoCredentialsError", "AuthenticationException")
    ):
        return VtzooError(f"{where} may not be read or written: {said}", "check your credentials for that server")
    if kind in ("BadHostKeyException", "HostKeyRefused"):
        return Network(
            f"{where}: {said}", "ask who keeps that server for its key; then: ssh-keyscan HOST >> ~/.ssh/known_hosts"
        )
    if "Redirect" in kind or "Certificate" in kind or (400 <= code < 500 and code not in _PASSING):
        return Network(f"{where} refuses: {said}", "check the URL, and what that server is")
    if isinstance(error, OSError | EOFError) or type(error).__module__.partition(".")[0] in _LIBRARIES:
        return Dropped(f"{where}: {said}", "try again; what has come already is kept")
    return None


def _printable(text: str) -> str:
    """One line that moves no cursor: a server may have written it."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:300]
