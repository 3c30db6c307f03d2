"""Fuzz what is read of safetensors files: the header, and the JSON document in it. Not part of the tests; needs atheris, which has no place in `dev`.

    python -m venv fuzz && fuzz/bin/pip install atheris pyyaml pydantic
    PYTHONPATH=. fuzz/bin/python tests/fuzz/fuzz_header.py corpus-header -max_total_time=1800 -rss_limit_mb=300

Whatever the bytes: a header that is sound by the format's rules, or Corrupt; below 300 MB.
"""

import json
import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vtzoo", "json"]):
    from vtzoo import files, strict
    from vtzoo.errors import Corrupt

NAMES = ["a", "b", "", "\ud800", "@head/x/w", "a" * 300]
KINDS = [*files.BITS, "F31", 3, None]
SIDES = [0, 1, 2, 3, 2**31, 2**62, 2**63, -1, 1.5, True, "2"]
PLACE = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)) / "w.safetensors"
ONE = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
SEEDS: list[tuple[object, int]] = [
    (ONE, 24),
    ({**ONE, "__metadata__": {"vtzoo": json.dumps({"schema": 1, "tasks": [{"name": "a", "classes": ["b"]}]})}}, 24),
    ({"a": {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]}, "b": {"dtype": "F4", "shape": [2], "data_offsets": [2, 3]}}, 3),
    ({}, 0),
]  # fmt: skip


def built(data: bytes) -> bytes:
    """A file whose header is JSON of tensors, right or nearly so, as bytes choose."""
    choose, table = atheris.FuzzedDataProvider(data), {}
    for _ in range(choose.ConsumeIntInRange(0, 4)):
        shape = [choose.PickValueInList(SIDES) for _ in range(choose.ConsumeIntInRange(0, 3))]
        offsets = [choose.ConsumeIntInRange(-1, 64) for _ in range(choose.ConsumeIntInRange(1, 3))]
        table[choose.PickValueInList(NAMES)] = {
            "dtype": choose.PickValueInList(KINDS),
            "shape": shape,
            "data_offsets": offsets,
        }
    if choose.ConsumeBool():
        table["__metadata__"] = {"vtzoo": choose.ConsumeUnicode(40)}
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + bytes(choose.ConsumeIntInRange(0, 64))


def one(data: bytes) -> None:
    """Read a file of these bytes, or with the length of the header put right, which chance never does, or of what they build."""
    if data[:1] < b"\x40":
        data = built(data[1:])
    if data[:1] > b"\x7f":
        cut = int.from_bytes(data[1:3], "little")
        data = struct.pack("<Q", min(cut, len(data) - 3)) + data[3:] if len(data) > 3 else data
    PLACE.write_bytes(data)
    try:
        head = files.header(PLACE)
    except Corrupt:
        return
    assert sum(s.end - s.start for s in head.tensors.values()) == len(data) - head.data_start
    try:
        strict.record(head.metadata.get("vtzoo", "{}"))
    except ValueError:
        return


def main() -> None:
    """Write seeds into the corpus folder, and go."""
    folder = next((Path(a) for a in sys.argv[1:] if not a.startswith("-")), None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for i, (table, size) in enumerate(SEEDS):
            text = json.dumps(table).encode()
            (folder / f"seed-{i}").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
            (folder / f"seed-{i}-put-right").write_bytes(b"\xff" + struct.pack("<H", len(text)) + text + bytes(size))
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
