"""Hostile files that are refused before torch is loaded: headers, indexes, names, refs, places, YAML of people. Each makes its files and says what is typed."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vtzoo.files import safetensors_header
from vtzoo.zoo import Zoo

D, E = "ab" * 32, "cd" * 32
Make = Callable[[Path], list[str]]


@dataclass(frozen=True)
class Case:
    """What makes the files in an empty folder and gives the words that are typed there, and the exit code that is documented for them."""

    make: Make
    code: int


def header(table: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file of any header."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _file(content: bytes, here: Path) -> list[str]:
    (here / "w.safetensors").write_bytes(content)
    return ["show", "./w.safetensors"]


def _sparse(size_bytes: int, here: Path) -> list[str]:
    with (here / "w.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", size_bytes - 8))
        file.truncate(size_bytes)
    return ["show", "./w.safetensors"]


def _large(unit: bytes, here: Path) -> list[str]:
    """A header as large as is read, of as many values as go in."""
    return _file(header(b'{"a":[' + unit * (8 * 10**6 // len(unit)) + b"1]}"), here)


def one(**changes: object) -> dict[str, object]:
    """The header of one sound tensor of 24 bytes, some of it changed."""
    return {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}}


def two(first: list[int], second: list[int]) -> dict[str, object]:
    """Two tensors of 12 bytes at these places."""
    return {n: {"dtype": "F32", "shape": [3], "data_offsets": o} for n, o in (("a", first), ("b", second))}


Z24 = bytes(24)
HEADERS: dict[str, bytes] = {
    "nothing": b"", "seven bytes": bytes(7), "length 0": header(b""), "length of all ones": header(one(), Z24, length=2**64 - 1),
    "length beyond the file": header(one(), Z24, length=4096), "length beyond the limit": header(one(), Z24, length=(8 << 20) + 1),
    "no JSON": header(b"{x"), "cut JSON": header(b'{"w": {'), "a list": header([]), "a number": header(b"7"), "null": header(b"null"),
    "a space first": header(b" {}"), "not UTF-8": header(b'{"\xff": 1}'), "UTF-16": header("{}".encode("utf-16")),
    "half a surrogate": header(b'{"\\ud800": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', bytes(4)),
    "nested 200000 deep": header(b'{"a":' * 200_000 + b"1"), "lists 40 deep in the metadata": header({"__metadata__": {"vtzoo": "[" * 40 + "]" * 40}}),
    "a number of 10000 digits": header(b'{"a": ' + b"9" * 10_000 + b"}"), "a tensor twice": header(b'{"w": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "w": 1}'),
    "a fact twice": header(b'{"w": {"dtype": "U8", "dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}'),
    "metadata is a list": header({"__metadata__": [1]}), "metadata of numbers": header({"__metadata__": {"a": 1}}),
    "vtzoo is no JSON": header({"__metadata__": {"vtzoo": "{"}}), "vtzoo is a list": header({"__metadata__": {"vtzoo": "[]"}}),
    "vtzoo says a thing twice": header({"__metadata__": {"vtzoo": '{"schema": 1, "schema": 2}'}}),
    "a tensor is a number": header({"w": 3}), "no dtype": header({"w": {"shape": [], "data_offsets": [0, 4]}}, bytes(4)),
    "an unknown dtype": header(one(dtype="F31"), Z24), "dtype a list": header(one(dtype=["F32"]), Z24), "dtype of a megabyte": header(one(dtype="F" * (1 << 20)), Z24),
    "shape a number": header(one(shape=6), Z24), "a negative side": header(one(shape=[-2, -3]), Z24), "a side of 1.5": header(one(shape=[1.5, 4]), Z24),
    "a side that is true": header(one(shape=[True, 6]), Z24), "sides that overflow": header(one(shape=[2**40, 2**40]), Z24),
    "sides that overflow beside 0": header(one(shape=[0, 2**40, 2**40], data_offsets=[0, 0])), "a side of 64 bits": header(one(shape=[2**63]), Z24),
    "65 sides": header(one(shape=[1] * 65, data_offsets=[0, 4]), bytes(4)), "a million sides": header(one(shape=[1] * 10**6, data_offsets=[0, 4]), bytes(4)),
    "half a byte": header({"w": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"1"), "one offset": header(one(data_offsets=[0]), Z24),
    "no offsets": header({"w": {"dtype": "F32", "shape": [6]}}, Z24), "offsets backwards": header(one(data_offsets=[24, 0]), Z24),
    "a negative offset": header(one(data_offsets=[-24, 0]), Z24), "an offset of text": header(one(data_offsets=["0", "24"]), Z24),
    "a shape too small": header(one(shape=[2, 2]), Z24), "a gap": header(two([0, 12], [16, 28]), bytes(28)), "an overlap": header(two([0, 12], [8, 20]), bytes(20)),
    "the same place twice": header(two([0, 12], [0, 12]), bytes(12)), "data cut": header(one(), bytes(23)), "no data": header(one()), "data too long": header(one(), bytes(25)),
    "a pickle by another name": b"\x80\x04\x95" + bytes(40), "a zip by another name": b"PK\x03\x04" + bytes(40),
}  # fmt: skip


def _index(text: str | bytes, words: list[str], here: Path) -> list[str]:
    (here / "zoo_index.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return words


def entry(section: str, facts: str, name: str = "a") -> str:
    """An index of one entry."""
    return f"schema: 1\n{section}:\n  {name}: {{{facts}}}\n"


def delta(facts: str) -> str:
    """An index of one delta."""
    return entry("deltas", f"digest: {D}, {facts}")


def model(files: str) -> str:
    """An index of one model."""
    return entry("models", f"files: {{{files}}}")


INDEXES: dict[str, str | bytes] = {
    "empty": "", "a list": "- a\n", "no schema": "deltas: {}\n", "schema of text": "schema: one\n", "schema 0": "schema: 0\n", "schema true": "schema: true\n",
    "a newer schema": "schema: 2\n", "an unknown section": "schema: 1\nrecipes: {}\n", "not UTF-8": b"schema: 1\n# \xff\n", "a NUL": b"schema: 1\n\0", "a tab": "schema:\t1\n\t- a",
    "two documents": "schema: 1\n---\nschema: 1\n", "an anchor": "schema: &a 1\n", "an alias": "schema: 1\ndeltas: *a\n", "a Python tag": "schema: !!python/object/apply:os.system [id]\n",
    "a binary tag": "schema: 1\ndeltas: !!binary aGk=\n", "billion laughs": "a: &a [x, x]\nb: &b [*a, *a]\nschema: 1\n", "a merge key": "schema: 1\n<<: {deltas: {}}\n",
    "a name twice": f"schema: 1\ndeltas:\n  a: {{digest: {D}}}\n  a: {{digest: {E}}}\n", "a key that is a map": "schema: 1\n? {a: 1}\n: 2\n", "a key that is a number": "schema: 1\n7: {}\n",
    "nested 200 deep": "schema: 1\ndeltas: " + "[" * 200 + "]" * 200, "nested 100000 deep": "schema: 1\ndeltas: " + "[" * 100_000, "git's conflict": "<<<<<<< HEAD\nschema: 1\n=======\n>>>>>>> x\n",
    "a name that climbs": entry("deltas", f"digest: {D}", "'../../etc/x'"), "a name of a device": entry("deltas", f"digest: {D}", "con"),
    "a name with an escape": entry("deltas", f"digest: {D}", '"a\\e[2J"'), "a name in Cyrillic": entry("deltas", f"digest: {D}", "\u0430"), "a name in capitals": entry("deltas", f"digest: {D}", "A"),
    "no digest": "schema: 1\ndeltas: {a: {method: lora}}\n", "a digest that climbs": entry("deltas", "digest: '../../../../etc/passwd'"), "a digest in capitals": entry("deltas", f"digest: {D.upper()}"),
    "a digest with a prefix": entry("deltas", f"digest: 'sha256:{D}'"), "a digest that is a number": entry("deltas", f"digest: {'1' * 64}"), "a digest of 63": entry("deltas", f"digest: {D[:-1]}"),
    "a size below zero": delta("size_bytes: -1"), "a size of 65 bits": delta("size_bytes: 99999999999999999999"), "a size of 5000 digits": delta("size_bytes: " + "9" * 5000),
    "a size in base 16 without end": delta("size_bytes: 0x" + "f" * 9000), "a size that is text": delta("size_bytes: many"), "tasks that are text": delta("tasks: pets"), "metrics that are a list": delta("metrics: []"),
    "a signature that climbs": delta("signature: '../../x'"), "a signature without a prefix": delta(f"signature: {E}"), "a command that is a list": delta("command: [rm, -rf]"),
    "a member that climbs": model(f"'../x': {D}"), "an absolute member": model(f"/etc/x: {D}"), "a member on a drive": model(f"'C:x': {D}"), "a member on a share": model(f"'\\\\srv\\x': {D}"),
    "a member's stream": model(f"'a.json:x': {D}"), "a hidden member": model(f".ssh: {D}"), "a member that is a device": model(f"CONOUT$: {D}"), "a member COM1": model(f"com1.txt: {D}"),
    "a member COM¹": model(f"COM¹: {D}"), "a member that ends in a dot": model(f"'x.': {D}"), "a member that ends in a space": model(f"'x ': {D}"), "a member with a NUL": model(f'"a\\0": {D}'),
    "a member of 300 characters": model(f"{'a' * 300}: {D}"), "members that differ by case": model(f"a.json: {D}, A.json: {D}"), "a member in a member": model(f"a: {D}, a/b: {D}"),
    "a member's digest that climbs": model("config.json: '../../x'"), "a member's digest that is a number": model(f"config.json: {'1' * 64}"), "no members": model(""), "members in a list": entry("models", f"files: [{D}]"),
    "a source that climbs": entry("backbones", "arch: test_vit, source: 'object:sha256:../../x'"), "no source": entry("backbones", "arch: test_vit"), "an arch that is a list": entry("backbones", "arch: [test_vit], source: x"),
    "an input of two sides": entry("backbones", "arch: test_vit, source: x, input_size: [3, 8]"), "an input of a billion": entry("backbones", "arch: test_vit, source: x, input_size: [3, 1000000000, 8]"),
    "a mean of text": entry("backbones", "arch: test_vit, source: x, mean: [a, b, c]"), "a mean without end": entry("backbones", "arch: test_vit, source: x, mean: [.inf, 0, 0]"), "a crop of NaN": entry("backbones", "arch: test_vit, source: x, crop_pct: .nan"),
    "a head of numbers": entry("backbones", "arch: test_vit, source: x, head: [1]"),
}  # fmt: skip
NAMES = (
    "", "/", "a/", "a//b", "..", "../a", "a/../b", "a..b", ".hidden", "a.", "A", "a b", "a\tb", "a\x1b[2J", "a\\b", "a:b", "c:a", "\\\\srv\\share\\x", "a@b", "~root", "con", "nul.txt", "aux/x", "com1", "lpt9.tar.gz",
    "conin$", "com\u00b9", "\u0430", "e\u0301", "\uff41", "a\u202eb", "a\u200bb", "\ud800", "x" * 97, "/".join(["x" * 90] * 3), "w.safetensors", "%2e%2e", "$home", "`id`", "a;b", "a|b", "https://x/y", "file:///etc",
)  # fmt: skip
REFS: dict[str, tuple[str, int]] = {
    "nothing": ("", 2), "a digest without a hash": ("a@ab12", 2), "a digest that climbs": ("a@sha256:../../x", 2), "a digest of 3": ("a@sha256:abc", 2), "a name that isn't there": ("nowhere", 3),
    "a path that isn't there": ("./nowhere.safetensors", 3), "a user that isn't there": ("~nobody-at-all/x", 3), "a path with a NUL": ("./a\0b", 3), "a folder": ("/", 2), "a device": ("/dev/zero", 2), "a share": ("\\\\srv\\share\\x", 3),
    "a text": ("/etc/passwd", 4), "climbing": ("../../../../../../../../etc/passwd", 4),
}  # fmt: skip
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
YAMLS: dict[str, str] = {
    "a list": "- a\n", "a key twice": "method: ties\nmethod: dare\n", "a Python tag": "method: !!python/object/apply:os.system [id]\n", "billion laughs": LAUGHS, "a list in itself": "method: &a [*a]\n",
    "an unknown key": "method: ties\ndeltas: [a]\nrun: id\n", "nested 100 deep": "method: " + "[" * 100 + "]" * 100, "nested 100000 deep": "method: " + "[" * 100_000, "a number of 5000 digits": "method: " + "9" * 5000,
    "no such day": "method: 2001-99-99\n", "two megabytes": "method: " + "a" * (2 << 20), "a million values": "method: [" + "1," * 500_000 + "]", "a NUL": "method: \0", "deltas of numbers": "method: ties\ndeltas: [1, 2]\n",
}  # fmt: skip


def _named(name: str, here: Path) -> list[str]:
    _one_delta(here)
    return ["mv", "a", name]


def _ref(ref: str, here: Path) -> list[str]:
    _one_delta(here)
    return ["show", ref]


def _one_delta(here: Path) -> tuple[Zoo, Path]:
    zoo = Zoo.init(here)
    told = {
        "schema": 1,
        "method": "lora",
        "backbone": {"name": "b"},
        "tasks": [],
        "metrics": {},
        "lineage": {},
        "config": {"parts": []},
    }
    digest = zoo.add_object(safetensors_header([("w", "F32", (2,))], {"vtzoo": json.dumps(told)}) + bytes(8))
    zoo.put("deltas", "a", {"digest": digest, "method": "lora", "tasks": []})
    return zoo, zoo.object(digest)


def _yaml(verb: list[str], text: str, here: Path) -> list[str]:
    (here / "f.yaml").write_text(text, encoding="utf-8")
    Zoo.init(here)
    return verb


def _linked(what: str, here: Path) -> list[str]:
    """A zoo of which something is a link to what lies beside it."""
    zoo, path = _one_delta(here)
    target = {"object": path, "shard": path.parent, "objects": path.parents[2], "folder": zoo.root / ".vtzoo"}[what]
    target.rename(here.parent / "elsewhere")
    target.symlink_to(here.parent / "elsewhere")
    return ["verify"]


def _at(make: Callable[[Path], object], here: Path) -> list[str]:
    """A zoo of which an object is something else."""
    _, path = _one_delta(here)
    path.unlink()
    make(path)
    return ["verify"]


def _changed(change: Callable[[Path], object], here: Path) -> list[str]:
    _, path = _one_delta(here)
    path.chmod(0o644)
    change(path)
    return ["verify"]


def _write(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    path.chmod(0o444)


def _not_finite(here: Path) -> list[str]:
    zoo = Zoo.init(here)
    digest = zoo.add_object(safetensors_header([("w", "F32", (2,))], {}) + struct.pack("<ff", 1.0, float("nan")))
    zoo.put("models", "m", {"files": {"model.safetensors": digest}})
    return ["verify"]


def _says(facts: dict[str, object], here: Path) -> list[str]:
    """A zoo whose index says of a delta what its file doesn't."""
    zoo, _ = _one_delta(here)
    zoo.put("deltas", "a", {**zoo.resolve("a").facts, **facts}, replace=True)
    return ["verify"]


PLACES: dict[str, Make] = {
    **{f"the {what} is a link": partial(_linked, what) for what in ("object", "shard", "objects", "folder")},
    "an object is a link to passwd": partial(_at, lambda p: p.symlink_to("/etc/passwd")), "an object is a link to nothing": partial(_at, lambda p: p.symlink_to("nothing")),
    "an object is a link to itself": partial(_at, lambda p: p.symlink_to(p.name)), "an object is a pipe": partial(_at, os.mkfifo), "an object is a folder": partial(_at, Path.mkdir), "an object is gone": partial(_at, lambda _: None),
    "an object can be written to": partial(_changed, lambda _: None), "an object of other bytes": partial(_changed, partial(_write, b"other")), "an object cut": partial(_changed, lambda p: _write(p.read_bytes()[:-1], p)),
    "an object of one flipped bit": partial(_changed, lambda p: _write(p.read_bytes()[:-1] + b"\x01", p)), "numbers that are none": _not_finite, "a size that isn't so": partial(_says, {"size_bytes": 5}),
    "a method that isn't so": partial(_says, {"method": "ssf"}), "tasks that aren't so": partial(_says, {"tasks": ["pets"]}),
}  # fmt: skip


def _key(text: bytes, here: Path) -> list[str]:
    _one_delta(here)
    (here / "key.pem").write_bytes(text)
    return ["sign", "a", "--key", "key.pem"]


CASES: dict[str, Case] = {
    **{f"header: {k}": Case(partial(_file, v), 4) for k, v in HEADERS.items()},
    **{f"header: eight megabytes of {k}": Case(partial(_large, v), 4) for k, v in (("lists", b"[],"), ("maps", b"{},"), ("numbers", b"1e9,"), ("text", b'"a",'))},
    "header: a hundred megabytes": Case(partial(_sparse, 100 << 20), 4),
    "header: a hundred gigabytes": Case(partial(_sparse, 100 << 30), 4),
    **{f"index: {k}": Case(partial(_index, v, ["ls"]), 4) for k, v in INDEXES.items()},
    **{f"name: {v!a:.40}": Case(partial(_named, v), 2) for v in NAMES},
    **{f"ref: {k}": Case(partial(_ref, v), code) for k, (v, code) in REFS.items()},
    **{f"merge: {k}": Case(partial(_yaml, ["merge", "--config", "f.yaml", "--name", "m"], v), 2) for k, v in YAMLS.items()},
    **{f"sweep: {k}": Case(partial(_yaml, ["sweep", "f.yaml", "--dry-run"], v), 2) for k, v in YAMLS.items()},
    **{f"place: {k}": Case(v, 4) for k, v in PLACES.items()},
}  # fmt: skip
