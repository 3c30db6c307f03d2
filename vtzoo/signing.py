"""Signatures of entries by keys that their owners hold, offline, with model-signing (a sigstore bundle around an in-toto statement).

Signed is the entry's `statement`: its section and all of its facts, and among them the digests of all its files, but for who called it what and when
(the name, `created`, `command`). A fact or a file put beside another entry's signature doesn't verify. The signature is an object of the zoo, and the
fact `signature: sha256:…` names it; so it goes wherever the entry goes.

    openssl ecparam -name prime256v1 -genkey -noout -out key.pem        a key to sign with
    openssl ec -in key.pem -pubout -out key.pub                         what others verify with
"""

import io
import json
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vtzoo.errors import Mismatch, NotFound, UsageError
from vtzoo.refs import Entry, signature_object

REQUIRED, PUBLIC_KEY = "VTZOO_REQUIRE_SIGNED", "VTZOO_PUBLIC_KEY"
FREE = frozenset(("signature", "created", "command"))
"""Facts that are not signed: they change when an entry is copied or signed."""
CURVES = "P-256, P-384 and P-521"
LIMIT_BYTES = 1 << 20
"""Of a signature; those of one statement have some 2 kB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Whose signatures count, and whether an entry must have one."""

    public_key: Path | None = None
    required: bool = False


def policy(*, require_signed: bool = False, public_key: Path | None = None) -> Policy:
    """What is asked for, else what the environment asks for.

    Raises:
        UsageError: signatures are required, and nothing says whose.
        NotFound: there is no such key.
    """
    required = require_signed or os.environ.get(REQUIRED, "").lower() not in ("", "0", "false", "no")
    named = os.environ.get(PUBLIC_KEY)
    key = public_key or (Path(named).expanduser() if named else None)
    if required and key is None:
        raise UsageError("signatures are required, and no key says whose", f"--public-key FILE, or set {PUBLIC_KEY}")
    if key is not None and not key.is_file():
        raise NotFound(f"there is no key {key}", "name the file of a public key in PEM form")
    return Policy(public_key=key, required=required)


def statement(entry: Entry) -> bytes:
    """What is signed of an entry, the same bytes for the same content."""
    facts = {k: v for k, v in entry.facts.items() if k not in FREE}
    return json.dumps({"section": entry.section, "facts": facts}, sort_keys=True, ensure_ascii=False).encode()


def sign(entry: Entry, key: Path) -> bytes:
    """Sign an entry with a private key on an elliptic curve (P-256, P-384 or P-521).

    Raises:
        NotFound: there is no such key.
        UsageError: it is no such key, or is encrypted; or model-signing is missing.
    """
    if not key.is_file():
        raise NotFound(f"there is no key {key}", "openssl ecparam -name prime256v1 -genkey -noout -out key.pem")
    with _library() as library, _written(statement(entry)) as (folder, place):
        config: Any = library.signing.Config()
        try:
            config.use_elliptic_key_signer(private_key=key)
        except (ValueError, TypeError, AttributeError) as error:  # encrypted, or of another kind
            hint = f"give a private key on one of the curves {CURVES}, in PEM form, not encrypted"
            raise UsageError(f"{key} can't sign: {_wrong_key(error)}", hint) from error
        config.sign(folder, place)
        return place.read_bytes()


def check(entry: Entry, read: Callable[[str], bytes], wanted: Policy) -> bool:
    """Compare an entry with its signature; whether it was signed with the policy's key.

    Args:
        entry: as it is, or as it is to be published.
        read: gives the content of the object with a digest.
        wanted: the policy; without a key nothing is compared.

    Raises:
        Mismatch: it isn't signed and has to be, or not with this key, or it says something else than what was signed.
        UsageError: what should be a public key isn't; or model-signing is missing.
    """
    digest = signature_object(entry.facts)
    if wanted.public_key is None:
        return False
    if not digest:
        if wanted.required:
            raise Mismatch(
                f"'{entry.name}' is not signed",
                f"ask for a signed one, or sign it: vtzoo sign {entry.name} --key KEY.pem",
            )
        return False
    _verify(entry, read(digest), wanted.public_key)
    return True


def _verify(entry: Entry, signature: bytes, key: Path) -> None:
    doubt = "is it the right key? if so, don't use this entry"
    if len(signature) > LIMIT_BYTES:
        raise Mismatch(f"the signature of '{entry.name}' has {len(signature)} bytes", doubt)
    with _library() as library, _written(statement(entry)) as (folder, place):
        place.write_bytes(signature)
        config: Any = library.verifying.Config()
        try:
            config.use_elliptic_key_verifier(public_key=key)
        except (ValueError, TypeError, AttributeError) as error:
            hint = f"give a public key on one of the curves {CURVES}, in PEM form"
            raise UsageError(f"{key} can't verify: {_wrong_key(error)}", hint) from error
        try:
            config.verify(folder, place)
        except Exception as error:  # whatever a stranger's bundle makes the library raise, it is not verified
            why = "its facts or files are others now" if str(error).startswith("Signature mismatch") else _line(error)
            raise Mismatch(f"'{entry.name}' is not what {key.name} signed: {why}", doubt) from error


@contextmanager
def _library() -> Generator[Any]:
    """The package, which says on stdout what only its own program should."""
    try:
        import model_signing
    except ImportError as error:
        raise UsageError(f"signatures need the package {error.name}", "pip install 'vtzoo[sign]'") from error
    with redirect_stdout(io.StringIO()):
        yield model_signing


@contextmanager
def _written(said: bytes) -> Generator[tuple[Path, Path]]:
    """The statement as the one file of a folder, which is what the package signs, and a place for the signature."""
    with TemporaryDirectory() as above:
        folder = Path(above) / "entry"
        folder.mkdir()
        (folder / "entry.json").write_bytes(said)
        yield folder, Path(above) / "signature.json"


def _wrong_key(error: BaseException) -> str:
    return "it is on no elliptic curve" if isinstance(error, AttributeError) else _line(error)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
