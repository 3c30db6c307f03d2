"""Look whether the zoo's entries are whole, what they say they are, and signed."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vtzoo import signing, talk
from vtzoo.errors import VtzooError
from vtzoo.refs import Entry
from vtzoo.results import Verified
from vtzoo.soundness import Looked, look, names_of, says
from vtzoo.zoo import Zoo

THREADS = min(8, os.cpu_count() or 1)


def verify(
    *refs: str, require_signed: bool = False, public_key: Path | None = None, threads: int = THREADS, zoo: Zoo | None = None
) -> Verified:  # fmt: skip
    """Read every object of entries once, and list what is wrong; nothing is changed.

    Args:
        refs: whose; all entries of the zoo unless given, its catalogue left out.
        require_signed: an entry without a signature is wrong, too; so it is where $VTZOO_REQUIRE_SIGNED is set.
        public_key: in PEM form; signatures are compared where it is given, here or by $VTZOO_PUBLIC_KEY.
        threads: how many files are read at once.
        zoo: where.

    Raises:
        NotFound: no such entry, or no such key.
        UsageError: signatures are required, and no key is given; or an entry is the catalogue's.
    """
    zoo = zoo or Zoo.find()
    wanted = signing.policy(require_signed=require_signed, public_key=public_key)
    entries = [zoo.resolve(ref) for ref in refs] if refs else [e for e in zoo.entries() if not e.builtin]
    start = time.perf_counter()
    objects = {digest: name for entry in entries for name, digest in names_of(entry).items()}
    with ThreadPoolExecutor(threads) as pool:
        made = pool.map(lambda item: look(zoo, item[1], item[0]), objects.items())
        looked = dict(zip(objects, talk.track(made, "verify", len(objects)), strict=True))
    rows = [_row(zoo, entry, looked, wanted) for entry in entries]
    report = {
        "entries": len(rows), "objects": len(objects), "size_bytes": sum(x.size_bytes for x in looked.values()),
        "seconds": time.perf_counter() - start, "signed": sum(bool(r["signed"]) for r in rows), "wrong": sum(bool(r["wrong"]) for r in rows),
    }  # fmt: skip
    return Verified(ref=", ".join(refs), path=str(zoo.root), report=report, rows=rows)


def _row(zoo: Zoo, entry: Entry, looked: dict[str, Looked], wanted: signing.Policy) -> dict[str, Any]:
    own = [looked[digest] for digest in names_of(entry).values()]
    wrong = [w for seen in own for w in seen.wrong]
    signed = False
    if own and not wrong:
        wrong += says(zoo, entry, sum(seen.size_bytes for seen in own))
    try:
        signed = signing.check(entry, lambda digest: zoo.object(digest).read_bytes(), wanted)
    except signing.UsageError:
        raise
    except (VtzooError, OSError) as error:
        wrong.append(str(error))
    return {"name": entry.name, "section": entry.section, "here": bool(own), "signed": signed, "wrong": wrong}
