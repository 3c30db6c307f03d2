"""What is said of a drawing, and the phrases that a text tower learns from: names, templates, WordNet's nouns and glosses."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from _pairs import Pair

TEMPLATES = (
    "a photo of a {}.", "a photo of the {}.", "a drawing of a {}.", "a drawing of the {}", "a picture of a {}.",
    "an illustration of a {}.", "clip art of a {}.", "an emoji of a {}.", "an icon of a {}.", "a cartoon of a {}.",
    "a sketch of a {}.", "an image of {}.", "a drawing of {}.", "this is a {}.", "the {}.", "a {}.", "some {}.",
)  # fmt: skip


def kind_of(pair: Pair) -> str:
    """A folder as words: `emoji/sky & weather` is "sky & weather", `clipart/animals/bugs` is "bugs"."""
    return pair.kind.rsplit("/", 1)[-1].replace("_", " ").replace("-", " ").removeprefix("face ")


def said(pair: Pair) -> tuple[str, ...]:
    """All phrases of a drawing: names as often as all else together."""
    about = (*pair.tags, kind_of(pair))
    names = pair.names or about
    return (*names * max(1, round((len(about) + 1) / len(names))), *about, f"{names[0]}, {kind_of(pair)}")


def lexicon(folder: Path) -> tuple[list[str], list[str]]:
    """WordNet's lemmas, and its nouns with their glosses ("dog, a member of the genus Canis")."""
    lemmas, glosses = list[str](), list[str]()
    for line in (folder / "data.noun").read_text(encoding="latin-1").splitlines():
        if not line.startswith(" "):
            head, gloss = line.split(" | ", 1)
            fields = head.split()
            words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
            lemmas += words
            glosses.append(f"{words[0]}, {gloss.split(';')[0].strip()}")
    for part in ("verb", "adj"):
        rows = (folder / f"index.{part}").read_text(encoding="latin-1").splitlines()
        lemmas += [row.split()[0].replace("_", " ") for row in rows if not row.startswith(" ")]
    return list(dict.fromkeys(lemmas)), glosses


def templated(phrases: Sequence[str], each: int, seed: str) -> tuple[list[str], list[int]]:
    """`each` templates of every phrase, and which phrase it was."""
    rng = random.Random(seed)
    rows = [i for i in range(len(phrases)) for _ in range(each)]
    return [rng.choice(TEMPLATES).format(phrases[i]) for i in rows], rows


def different(phrases: Iterable[str]) -> list[str]:
    """Each phrase once, in alphabetical order."""
    return sorted({phrase for phrase in phrases if phrase})
