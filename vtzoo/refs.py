"""Names, digests and refs: what a person types, checked in one place, and found among a zoo's entries.

    name = part { "/" part }          part = [a-z0-9][a-z0-9._-]*, at most 96 characters, no "..", no Windows device
    ref  = name | unique prefix | name "@sha256:" (4 to 64 hex digits) | path
    path = starts with "./", "../", "/", "~" or a drive, or ends in ".safetensors"

Everything that reads a name, a digest or a file name from a person or an index asks this module.
"""

import math
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast, get_args

from vtzoo.errors import Corrupt, NotFound, UsageError, did_you_mean

Section = Literal["backbones", "deltas", "models"]
SECTIONS: tuple[Section, ...] = get_args(Section)
EXPORTS = {".onnx": "onnx", ".pt2": "pt2", ".xml": "openvino", ".pte": "executorch"}
"""Kinds of exported files by the suffix of the one that is named."""

_PART_LIMIT, _NAME_LIMIT = 96, 255
_PART = re.compile(r"[a-z0-9][a-z0-9._-]*")
_MEMBER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PIN = re.compile(r"[0-9a-f]{4,64}")
_PATH = re.compile(r"\.{0,2}[/\\]|~|[A-Za-z]:")
_SHOWN = 8
_OBJECT, _SIGNATURE = "object:sha256:", "sha256:"
_CONTAINED = "take it away: what a zoo holds lies in it"
_COUNT_LIMIT, _PIXELS_LIMIT = 2**63, 1 << 16
_RULE = "use lower-case letters, digits, '.', '_' and '-', with '/' between parts, for example fashion/lora"
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("arch", "source", "license", "fingerprint", "good_for", "interpolation", "crop_mode"), str),
    **dict.fromkeys(("digest", "method", "backbone", "kind", "created", "command", "signature"), str),
    **dict.fromkeys(("params", "features", "size_bytes"), int),
    **dict.fromkeys(("head", "input_size", "mean", "std", "tasks"), list),
    **dict.fromkeys(("model_args", "metrics", "lineage", "files"), dict),
    "crop_pct": (int, float),
}
_REQUIRED: dict[Section, tuple[str, ...]] = {
    "backbones": ("arch", "source"),
    "deltas": ("digest",),
    "models": ("files",),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a zoo: a name in a section with its facts; `builtin` when it comes from the catalogue."""

    section: Section
    name: str
    facts: dict[str, Any]
    builtin: bool = False

    @property
    def digest(self) -> str:
        """Its file's sha256 (of several files, the weights'), 64 hex digits; empty when it has none."""
        files: Mapping[str, str] = self.facts.get("files") or {}
        own = self.facts.get("digest") or files.get("model.safetensors") or next((files[k] for k in sorted(files)), "")
        return str(own or _source_object(self.facts))

    @property
    def objects(self) -> frozenset[str]:
        """The digests of all objects that it keeps alive in its zoo."""
        return objects_of(self.section, self.facts)

    @property
    def pinned(self) -> str:
        """The ref that names exactly this content."""
        return f"{self.name}@sha256:{self.digest[:12]}" if self.digest else self.name


def check_name(text: str) -> str:
    """Give back a legal name.

    Raises:
        UsageError: it does not follow the grammar.
    """
    parts = text.split("/")
    for part in parts:
        if not _PART.fullmatch(part) or ".." in part or part.endswith(".") or len(part) > _PART_LIMIT:
            raise UsageError(f"{shown(text)} is no legal name", _RULE)
        if _DEVICE.fullmatch(part):
            raise UsageError(f"{shown(text)} is no legal name: Windows reserves '{part}'", "choose another word")
    if len(text) > _NAME_LIMIT:
        raise UsageError(f"a name of {len(text)} characters is too long", f"use at most {_NAME_LIMIT}")
    if is_path(text):
        raise UsageError(f"{shown(text)} is no legal name: it reads as a path", "leave '.safetensors' out of the name")
    return text


def check_digest(text: str) -> str:
    """Give back a legal digest: 64 lower-case hex digits.

    Raises:
        UsageError: anything else.
    """
    if not _DIGEST.fullmatch(text):
        raise UsageError(f"{shown(text)} is no sha256", "a digest has 64 hex digits, lower case, without a prefix")
    return text


def check_member(text: str) -> str:
    """Give back the relative path of a file inside a model's folder.

    Raises:
        UsageError: it could leave the folder, or some system can't hold it.
    """
    if len(text) > _NAME_LIMIT:
        raise UsageError(f"a file name of {len(text)} characters is too long", f"use at most {_NAME_LIMIT}")
    for part in text.split("/"):
        if not _MEMBER.fullmatch(part) or ".." in part or part.endswith(".") or _DEVICE.fullmatch(part):
            raise UsageError(f"{shown(text)} is no legal file name in a model", "use a plain relative path")
    return text


def check_section(text: str) -> Section:
    """Give back a section's name.

    Raises:
        UsageError: there is no such section.
    """
    if text not in SECTIONS:
        raise UsageError(f"{shown(text)} is no section of a zoo", did_you_mean(text, SECTIONS))
    return text


def check_facts(section: Section, facts: Mapping[str, Any]) -> None:
    """Check the facts that others rely on: required ones, types, digests, file names.

    Raises:
        UsageError: the first that is wrong.
    """
    for key in _REQUIRED[section]:
        if not facts.get(key):
            raise UsageError(f"'{key}' is missing", f"every entry of {section} has {' and '.join(_REQUIRED[section])}")
    for key, value in facts.items():
        wanted = _TYPES.get(key)
        if value is None or wanted is None:
            continue
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise UsageError(f"'{key}' is {shown(value)}", f"write a {_word(wanted)} there")
    _check_members(facts.get("files") or {})
    _check_numbers(facts)
    if facts.get("digest"):
        check_digest(facts["digest"])
    if str(facts.get("source", "")).startswith(_OBJECT):
        check_digest(_source_object(facts))
    if facts.get("signature"):
        signature_object(facts)


def check_contained(path: Path, root: Path) -> Path:
    """Give back the place of a file below a folder that a stranger may have filled; it needn't be there yet.

    Raises:
        Corrupt: the way there leads through a symbolic link, or no ordinary file is at its end.
    """
    check_way(path, root)
    with suppress(FileNotFoundError, NotADirectoryError):  # in one look: others make and remove it meanwhile
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise Corrupt(f"{path} is {'a symbolic link' if stat.S_ISLNK(mode) else 'no ordinary file'}", _CONTAINED)
    return path


def check_way(path: Path, root: Path) -> None:
    """Refuse a place below a folder whose way there leads out of it.

    Raises:
        Corrupt: through a symbolic link.
    """
    for place in path.parents:
        if place == root:
            return
        if place.is_symlink():
            raise Corrupt(f"{place} is a symbolic link", _CONTAINED)


def signature_object(facts: Mapping[str, Any]) -> str:
    """The digest of an entry's signature; "" where it has none.

    Raises:
        UsageError: it is no digest.
    """
    said = str(facts.get("signature") or "")
    if said and not said.startswith(_SIGNATURE):
        raise UsageError(f"'signature' is {shown(said)}", "write sha256: and 64 hex digits there")
    return check_digest(said.removeprefix(_SIGNATURE)) if said else ""


def objects_of(section: str, facts: Mapping[str, Any]) -> frozenset[str]:
    """The digests of the objects that an entry with these facts keeps alive."""
    files: Mapping[str, str] = facts.get("files") or {}
    own = [_source_object(facts)] if section == "backbones" else [*files.values(), facts.get("digest") or ""]
    return frozenset(digest for digest in (*own, signature_object(facts)) if digest)


def contents_of(entry: Entry) -> list[str]:
    """The digests of the files whose bytes its `size_bytes` counts: equal files each, its signature not."""
    if entry.section == "models":
        return list(entry.facts["files"].values())
    return sorted(objects_of(entry.section, {**entry.facts, "signature": None}))


def is_path(ref: str) -> bool:
    """Whether a ref names a file rather than an entry."""
    return bool(_PATH.match(ref)) or ref.endswith(".safetensors")


def expanded(path: str | Path) -> Path:
    """A path with `~` and `~user` written out.

    Raises:
        NotFound: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise NotFound(f"{shown(str(path))} does not exist", "check the path") from error


def as_path(ref: str) -> Path:
    """The file that a path ref names.

    Raises:
        NotFound: nothing is there.
    """
    path = expanded(ref)
    if "\0" in ref or not path.exists():
        raise NotFound(f"{shown(ref)} does not exist", "check the path; a name of the zoo has no './'")
    return path


def shown(value: object) -> str:
    """A user's value in quotes, on one line, not too long."""
    try:
        text = f"'{value}'" if isinstance(value, str) and value.isprintable() else repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "a number without end"
    return text if len(text) <= 120 else f"{text[:100]}…{text[-1]}"


def resolve(ref: str, entries: Iterable[Entry], section: Section | None = None) -> Entry:
    """Find the entry that a ref means: the exact name, else a unique prefix, with or without a digest.

    Raises:
        NotFound: none; the hint suggests the nearest.
        UsageError: several; the message lists them.
    """
    name, pin = _split(ref)
    every = list(entries)
    found = [e for e in every if section in (None, e.section) and e.name.startswith(name) and e.digest.startswith(pin)]
    exact = [e for e in found if e.name == name]
    found = [e for e in exact if not e.builtin] or exact or found
    if len(found) == 1:
        return found[0]
    raise _ambiguous(ref, found) if found else _missing(ref, every, section)


def _split(ref: str) -> tuple[str, str]:
    """Take a ref apart into name and digest prefix (without `sha256:`)."""
    if not ref:
        raise UsageError("the ref is empty", "see the names with: vtzoo ls")
    if is_path(ref):
        raise UsageError(f"{shown(ref)} is a path, a name of the zoo is wanted", "see the names with: vtzoo ls")
    name, at, pin = ref.partition("@")
    if at and not (pin.startswith("sha256:") and _PIN.fullmatch(pin[7:])):
        raise UsageError(f"{shown(ref)} is no ref", "after '@' stand sha256: and 4 to 64 hex digits: name@sha256:ab12")
    return name, pin[7:]


def _ambiguous(ref: str, found: Sequence[Entry]) -> UsageError:
    twice = len({e.name for e in found}) < len(found)
    names = sorted(f"{e.pinned} ({e.section})" if twice else e.name for e in found)
    listed = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return UsageError(f"{shown(ref)} could be {listed}", f"type one in full, for example {names[0].split(' ')[0]}")


def _missing(ref: str, every: Sequence[Entry], section: Section | None) -> NotFound:
    name, pin = _split(ref)
    what = section[:-1] if section else "entry"
    said = f"no {what} is called {shown(ref)}"
    if ref.startswith("..") or ref.endswith(tuple(EXPORTS)):
        return NotFound(said, f"to name a file, start with './': ./{ref}")
    same = [e for e in every if e.name == name]
    for entry in same:
        if pin and section in (None, entry.section):
            return NotFound(said, f"'{name}' is there with other content: {entry.pinned}")
    if same:
        return NotFound(said, f"'{name}' is one of the {same[0].section}; a {what} is wanted here")
    near = did_you_mean(name.lower(), {e.name for e in every if section in (None, e.section)})
    return NotFound(said, near or "see the names with: vtzoo ls")


def _source_object(facts: Mapping[str, Any]) -> str:
    source = str(facts.get("source") or "")
    return source.removeprefix(_OBJECT) if source.startswith(_OBJECT) else ""


def _check_members(files: Mapping[Any, Any]) -> None:
    """Names that are legal, stand for one file each where A and a are the same, and are no folder of another; digests that are texts."""
    seen = set[str]()
    for member, digest in files.items():
        check_member(str(member))
        if not isinstance(digest, str):
            raise UsageError(f"the digest of {shown(member)} is {shown(digest)}", "put it in quotes")
        check_digest(digest)
        if str(member).lower() in seen:
            raise UsageError(f"{shown(member)} differs from another file by case alone", "give each a name of its own")
        seen.add(str(member).lower())
    for member in seen:
        if any(str(above) in seen for above in PurePosixPath(member).parents):
            raise UsageError(f"{shown(member)} lies in another file", "give each a name of its own")


def _check_numbers(facts: Mapping[str, Any]) -> None:
    for key in ("params", "features", "size_bytes"):
        if not 0 <= (facts.get(key) or 0) < _COUNT_LIMIT:
            raise UsageError(f"'{key}' is {shown(facts[key])}", "a count is not negative, and has fewer than 64 bits")
    for key, check, wanted in _LISTS:
        if not all(check(value) for value in facts.get(key) or ()):
            raise UsageError(f"'{key}' is {shown(facts[key])}", f"write {wanted} there")
    if len(facts.get("input_size") or (0, 0, 0)) != 3:
        raise UsageError(f"'input_size' is {shown(facts['input_size'])}", "write channels, height and width there")
    if not is_finite(facts.get("crop_pct") or 0):
        raise UsageError(f"'crop_pct' is {facts['crop_pct']}", "write a number there")


def is_finite(value: object) -> bool:
    """Whether it is a number, and neither NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_side(value: object) -> bool:
    return type(value) is int and 0 < value <= _PIXELS_LIMIT


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_LISTS: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("input_size", _is_side, f"whole pixels up to {_PIXELS_LIMIT}"), ("mean", is_finite, "numbers"), ("std", is_finite, "numbers"),
    ("head", _is_text, "names"),
)  # fmt: skip


def _word(wanted: type | tuple[type, ...]) -> str:
    return {str: "text", int: "whole number", list: "list", dict: "map"}.get(cast("type", wanted), "number")
