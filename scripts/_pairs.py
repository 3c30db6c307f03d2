"""Named drawings of packages: each with the words that its package says of it and the kind that it is filed under."""

import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import _registries as registries

PUNCTUATION = re.compile(r"[^A-Za-z0-9&'$. -]+")
TITLE, KEYWORD = re.compile(r"<dc:title>([^<]*)"), re.compile(r"<rdf:li>([^<]+)")
SERIES = re.compile(r"(?i)clip ?art|collection|theme|svg|\bicon|symbols$|grama")
ENTRY = re.compile(r"^(name|category|icon)#(\d+)=(.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Pair:
    """A drawing: its file, the name that splits go by, what it is called (best first), and its kind as a path."""

    path: Path
    key: str
    names: tuple[str, ...]
    kind: str
    tags: tuple[str, ...] = ()


def plain(text: str) -> str:
    """Words alone: no underscores, no numbers at the end, one space between."""
    text = PUNCTUATION.sub(" ", html.unescape(text).replace("_", " "))
    return " ".join(re.sub(r"[ \d.-]+$", "", text).lower().split())


def several(*texts: str) -> tuple[str, ...]:
    """Different phrases of two letters or more, in their order."""
    return tuple(dict.fromkeys(text for text in map(plain, texts) if len(text) > 1))


def words_of_emoji(fetched: registries.Fetched) -> dict[str, tuple[str, tuple[str, ...]]]:
    """CLDR's short name and keywords of each emoji, by its code points (package `emojibase-data`)."""
    rows = json.loads((fetched.folder / "en" / "compact.json").read_text(encoding="utf-8"))
    return {bare(row["hexcode"]): (row["label"], tuple(row.get("tags", ()))) for row in rows}


def bare(codes: str) -> str:
    """Code points without variation selectors, as some vendors leave them out."""
    return codes.lower().replace("-fe0f", "")


def emoji(folder: Path, meta: Path, words: dict[str, tuple[str, tuple[str, ...]]]) -> Iterator[Pair]:
    """The emoji among a folder's images, named by their code points; `meta` is emoji-datasource's list."""
    files = {bare(path.stem): path for path in sorted(folder.iterdir())}
    for entry in json.loads(meta.read_text(encoding="utf-8")):
        code = bare(entry["unified"])
        if entry["category"] != "Component" and code in files:
            label, tags = words.get(code, (entry["name"], ()))
            names = several(label, *entry["short_names"])
            yield Pair(files[code], entry["image"], names, f"emoji/{entry['subcategory']}", several(*tags))


def clipart(png: Path, svg: Path) -> Iterator[Pair]:
    """Open Clip Art: titles and keywords stand in the drawing's own file, folders are the kinds."""
    for path in sorted(png.rglob("*.png")):
        kind = path.parent.relative_to(png).as_posix()
        source = (svg / kind / path.name).with_suffix(".svg")
        text = source.read_text(encoding="utf-8", errors="replace") if source.is_file() else ""
        title = TITLE.search(text)
        names = several(title[1] if title and not SERIES.search(title[1]) else "") or several(path.stem)
        yield Pair(path, path.name, names, f"clipart/{kind}", several(*KEYWORD.findall(text)))


def stamps(root: Path) -> Iterator[Pair]:
    """Tux Paint's stamps: the first line of a description is English."""
    for path in sorted(root.rglob("*.png")):
        text = path.with_suffix(".txt")
        said = text.read_text(encoding="utf-8").split("\n")[0] if text.is_file() else ""
        names = several(re.sub(r"^(a|an|the) ", "", said.strip(" .").lower()), path.stem)
        yield Pair(path, path.name, names, f"stamps/{path.parent.relative_to(root).as_posix()}")


def flashcards(root: Path) -> Iterator[Pair]:
    """Art4Apps' pictures of words."""
    for path in sorted(root.rglob("*.jpg")):
        yield Pair(path, path.name, several(path.stem), f"flashcards/{path.parent.name}")


def furniture(folder: Path) -> Iterator[Pair]:
    """Sweet Home 3D's pieces, each catalogue a zip with a list of properties."""
    registries.unzip(folder, "*.sh3f")
    for listing in sorted(folder.rglob("PluginFurnitureCatalog.properties")):
        rows: dict[str, dict[str, str]] = {}
        for field, number, value in ENTRY.findall(listing.read_text(encoding="latin-1")):
            rows.setdefault(number, {})[field] = value.strip()
        for row in rows.values():
            path = listing.parent / unquote(row.get("icon", "")).lstrip("/")
            if path.is_file():
                yield Pair(path, path.name, several(row["name"]), f"furniture/{row['category'].lower()}")
