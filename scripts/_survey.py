"""The survey's table: each of its cells with the names that cover it here."""

from vtzoo import registry

PARTS = {
    "fine-tuning": ("full", "partial", "head"),
    "prompt": ("vision-driven", "language-driven", "vision-language"),
    "adapter": ("sequential", "parallel", "mix"),
    "parameter": ("bias", "weight", "weight-and-bias"),
}
ABOUT = {
    "fine-tuning": "the backbone's own numbers are trained, all, some or none",
    "prompt": "something is put before the network: pixels, tokens, or the words that a text tower is told",
    "adapter": "small modules are put between the layers, beside them, or both",
    "parameter": "the layers' numbers are changed by few: biases, weights, or both",
    "remapping": "what one network knows goes over into another",
}
MORE = {
    ("prompt", "vision-language"): ("tpt", "vtzoo eval --test-time"),
    ("remapping", "weight-based"): ("slim[…]", "vtzoo distill --student"),
    ("remapping", "architecture-based"): ("dna[…]", "vtzoo distill --student"),
}
"""What no folder of the registry lists: its name, and where it is used."""
REMAPPING = {
    "knowledge-based": ("losses", "vtzoo distill --loss"),
    "weight-based": ("inits", "vtzoo distill --init"),
    "architecture-based": (None, ""),
}
TOP = """*Visual Tuning* (Yu et al. 2024, [2305.06061](https://arxiv.org/abs/2305.06061)) sorts the ways to tune a large vision model into
five groups. Each cell names what `vtzoo` has of it; a name's page has its paper and formula."""
BOTTOM = """[Methods](methods.md) · [losses](losses.md) · [inits](inits.md) · `slim[…]` and `dna[…]`: [distilling](../guides/distilling.md) ·
`tpt`: [language](../guides/language.md). `lora` acts on either tower of a dual encoder (`targets=qkv|text.qkv`)."""


def rows() -> list[tuple[str, str, str, str]]:
    """Group, part, names, and where they are used.

    Raises:
        ValueError: a method is of no cell, or a cell has no name.
    """
    cards = registry.cards("methods")
    known = {f"{group}/{part}" for group, parts in PARTS.items() for part in parts}
    if lost := sorted({c.group for c in cards} - known):
        raise ValueError(f"the survey has no cell {lost}")
    found = [
        _row(group, part, [c.name for c in cards if c.group == f"{group}/{part}"], "vtzoo train --method")
        for group, parts in PARTS.items()
        for part in parts
    ]
    for part, (kind, use) in REMAPPING.items():
        found.append(_row("remapping", part, [c.name for c in registry.cards(kind)] if kind else [], use))
    return found


def _row(group: str, part: str, names: list[str], use: str) -> tuple[str, str, str, str]:
    more, where = MORE.get((group, part), ("", ""))
    every = sorted([*names, *([more] if more else [])])
    if not every:
        raise ValueError(f"nothing covers {group}/{part}")
    uses = [u for u in (use, where) if u]
    return group, part, ", ".join(f"`{n}`" for n in every), ", ".join(f"`{u}`" for u in uses)
