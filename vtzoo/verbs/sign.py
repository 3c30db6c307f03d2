"""Sign entries of the zoo with a key of one's own."""

from pathlib import Path

from vtzoo import signing
from vtzoo.errors import Corrupt, UsageError
from vtzoo.results import Result
from vtzoo.soundness import look, names_of, says
from vtzoo.zoo import Zoo


def sign(*refs: str, key: Path, zoo: Zoo | None = None) -> list[Result]:
    """Sign entries as they are, read once more before; an older signature is replaced.

    Args:
        refs: of this zoo's own entries.
        key: a private key on an elliptic curve, in PEM form.
        zoo: where.

    Raises:
        NotFound: no such entry, or no such key.
        UsageError: an entry is the catalogue's, or the key is of another kind.
        Corrupt: an entry's files are not what its index says.
        Conflict: an entry was changed meanwhile.
    """
    zoo, made = zoo or Zoo.find(), list[Result]()
    for entry in [zoo.resolve(ref) for ref in refs]:
        if entry.builtin:
            raise UsageError(f"'{entry.name}' belongs to the built-in catalogue: it stays as it is", "see: vtzoo ls")
        looked = [look(zoo, name, digest) for name, digest in names_of(entry).items()]
        wrong = [w for seen in looked for w in seen.wrong]
        wrong = wrong or [*says(zoo, entry, sum(seen.size_bytes for seen in looked))]
        if wrong:
            raise Corrupt(f"'{entry.name}' is not signed: {wrong[0]}", f"vtzoo verify {entry.name}")
        digest = zoo.add_object(signing.sign(entry, key))
        signed = {"command": "", **entry.facts, "signature": f"sha256:{digest}"}
        zoo.put(entry.section, entry.name, signed, replace=entry)
        made.append(Result(ref=entry.name, path=str(zoo.object(digest))))
    return made
