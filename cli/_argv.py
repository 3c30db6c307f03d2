"""Global options may stand before or after the verb: here they are moved in front of it, where Typer expects them."""

from collections.abc import Sequence

from vtzoo.errors import UsageError

FLAGS = ("--json", "--quiet", "--no-color", "--version")
VALUED = ("--zoo",)
GLOBAL_OPTIONS = (*VALUED, *FLAGS)


def hoist(argv: Sequence[str]) -> list[str]:
    """Move the global options to the front; what follows `--` is left alone.

    Raises:
        UsageError: `--zoo` stands last, or another option follows it.
    """
    front: list[str] = []
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            return [*front, *rest, word, *words]
        if word in VALUED:
            front += [word, _value(word, words)]
        else:
            (front if _is_global(word) else rest).append(word)
    return [*front, *rest]


def _is_global(word: str) -> bool:
    return word in FLAGS or word.startswith(tuple(f"{name}=" for name in VALUED))


def _value(option: str, words: list[str]) -> str:
    if not words or words[0].startswith("--"):
        raise UsageError(f"option {option} needs a value", f"write {option} DIR")
    return words.pop(0)
