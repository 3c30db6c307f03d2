"""What is kept away from the alignment of images and words: whole kinds of drawings, and nouns that name such a kind."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from _pairs import Pair

EMOJI = {
    "mammal": ("animal-mammal",),
    "bird": ("animal-bird",),
    "fruit": ("food-fruit",),
    "dessert": ("food-sweet",),
    "sport": ("sport", "person-sport"),
    "game": ("game",),
    "music": ("music", "musical-instrument"),
    "weather": ("sky & weather",),
    "vehicle": ("transport-ground",),
    "clothing": ("clothing",),
    "building": ("place-building",),
    "flag": ("country-flag", "subdivision-flag", "flag"),
}
KINDS = re.compile(
    r"^emoji/(drink|monkey-face|cat-face)$"
    r"|^clipart/(animals/(mammals|birds)|food/(fruit|desserts|beverages)|recreation/(games|music|sports)"
    r"|signs_and_symbols/flags|computer/(icons|games)|unsorted)|^clipart/animals$"
    r"|^stamps/(animals/(mammals|marsupials|birds)|food/(fruit|dessert)|hobbies/music|sports|symbols/(music|chess)"
    r"|town/flags)"
    r"|^flashcards/(animals|sport)"
)
ROOTS = {  # lemma: its sense, counted from the commonest
    "mammal": 1, "bird": 1, "edible_fruit": 1, "dessert": 1, "confection": 1, "cake": 3, "beverage": 1, "game": 1,
    "sport": 1, "athlete": 1, "musical_instrument": 1, "music": 1, "musician": 1, "playing_card": 1, "flag": 1,
}  # fmt: skip
WORDS = re.compile(
    r"\b(mammals?|birds?|fruits?|desserts?|cakes?|beverages?|drinks?|games?|music|musical|sports?|flags?|icons?)\b"
)


def emoji_class(pair: Pair) -> str | None:
    """The task's class of an emoji, None for one that belongs to none."""
    return next((name for name, kinds in EMOJI.items() if pair.kind.removeprefix("emoji/") in kinds), None)


@dataclass(frozen=True, slots=True)
class Nouns:
    """WordNet's nouns: the synsets of a lemma, its commonest sense first, and what each synset is a kind of."""

    senses: dict[str, list[str]]
    above: dict[str, list[str]]

    @classmethod
    def read(cls, folder: Path) -> "Nouns":
        """Read index.noun and data.noun (wndb(5WN)); their licence's lines start with a space."""
        senses: dict[str, list[str]] = {}
        for line in (folder / "index.noun").read_text(encoding="latin-1").splitlines():
            if not line.startswith(" "):
                fields = line.split()
                senses[fields[0]] = fields[-int(fields[2]) :]
        above: dict[str, list[str]] = {}
        for line in (folder / "data.noun").read_text(encoding="latin-1").splitlines():
            if not line.startswith(" "):
                fields = line.split(" | ")[0].split()
                above[fields[0]] = [b for a, b in pairwise(fields) if a in ("@", "@i")]
        return cls(senses, above)

    def kinds(self, phrase: str) -> set[str]:
        """All that the commonest sense of a phrase, or of its last word, is a kind of."""
        lemma = phrase.replace(" ", "_")
        word = next((w for w in _forms(lemma) if w in self.senses), None)
        found, todo = set[str](), self.senses[word][:1] if word else []
        while todo:
            one = todo.pop()
            if one not in found:
                found.add(one)
                todo += self.above.get(one, [])
        return found

    def roots(self) -> set[str]:
        """The synsets of the held-out kinds."""
        return {self.senses[root][sense - 1] for root, sense in ROOTS.items()}


def _forms(lemma: str) -> Iterable[str]:
    """A lemma, its last word, and both in the singular, as far as English makes it easy."""
    for word in (lemma, lemma.rsplit("_", 1)[-1]):
        yield word
        yield from (word.removesuffix(end) for end in ("s", "es") if word.endswith(end))


def is_held(pair: Pair, nouns: Nouns) -> bool:
    """Whether a drawing is of a held-out kind by its folder, its words, or what WordNet says that it is."""
    if emoji_class(pair) or KINDS.search(pair.kind):
        return True
    if WORDS.search(" ".join((*pair.names, *pair.tags, pair.kind.split("/", 1)[1].replace("_", " ")))):
        return True
    roots = nouns.roots()
    return any(nouns.kinds(name) & roots for name in pair.names)
