import errno
import json
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from vtzoo import files
from vtzoo.errors import Conflict, Corrupt, NotFound, Resources, UsageError, VtzooError

HEADER_AND_DATA = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 100 kB."""
    if (
        sys.platform != "linux"
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=100k", "none", str(tmp_path)], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("no permission to mount a small file system")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.fixture
def read_only_disk(small_disk: Path) -> Path:
    """The same, mounted read-only (root writes through permissions)."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    return small_disk


def build(table: object, data: bytes = b"\0" * 24, *, length: int | None = None) -> bytes:
    """Assemble a file from a header (JSON value or raw bytes) and data."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(**changes: object) -> dict:
    """One sound 24-byte tensor with some of its facts changed."""
    return {"w": {**HEADER_AND_DATA["w"], **changes}}


def two(first: list[int], second: list[int]) -> dict:
    """Two 12-byte tensors at these offsets."""
    return {n: {"dtype": "F32", "shape": [3], "data_offsets": o} for n, o in (("a", first), ("b", second))}


CORRUPT = {
    "empty": (b"", "0 bytes, fewer than the 8"),
    "seven bytes": (b"\0" * 7, "7 bytes"),
    "length beyond the limit": (build(HEADER_AND_DATA, length=(8 << 20) + 1), "the limit is 8388608"),
    "length of all ones": (build(HEADER_AND_DATA, length=2**64 - 1), "18446744073709551615"),
    "length beyond the file": (build(HEADER_AND_DATA, length=4096), "truncated"),
    "length zero": (build(b"", b""), "no JSON object"),
    "not JSON": (build(b"{nonsense", b""), "no JSON"),
    "cut JSON": (build(b'{"w": {"dtype"', b""), "no JSON"),
    "a list": (build(b"[]", b""), "no JSON object"),
    "leading space": (build(b" {}", b""), "no JSON object"),
    "not UTF-8": (build(b'{"\xff": 1}', b""), "not UTF-8"),
    "byte order mark": (build(b"\xef\xbb\xbf{}", b""), "no JSON object"),
    "lone surrogate": (build(b'{"\\ud800": {"dtype":"F32","shape":[],"data_offsets":[0,4]}}', b"1234"), "surrogate"),
    "nested too deeply": (build(b'{"a":' * 200_000 + b"1", b""), "nested too deeply"),
    "endless number": (build(b'{"a":' + b"9" * 10_000 + b"}", b""), "digits"),
    "tensor twice": (build(b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":1}', b""), "says 'w' twice"),
    "fact twice": (
        build(b'{"w":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}', b""),
        "says 'dtype' twice",
    ),
    "metadata no map": (build({"__metadata__": [1]}, b""), "no map of strings"),
    "metadata no strings": (build({"__metadata__": {"a": 1}}, b""), "no map of strings"),
    "tensor no map": (build({"w": 3}, b""), "'w' has no description"),
    "no dtype": (build({"w": {"shape": [], "data_offsets": [0, 4]}}), "unknown dtype None"),
    "unknown dtype": (build(tensor(dtype="F31")), "unknown dtype 'F31'"),
    "dtype no string": (build(tensor(dtype=["F32"])), "unknown dtype"),
    "shape no list": (build(tensor(shape=6)), "the shape 6"),
    "negative size": (build(tensor(shape=[-2, -3])), "the shape [-2, -3]"),
    "fractional size": (build(tensor(shape=[2.0, 3])), "the shape"),
    "boolean size": (build(tensor(shape=[True, 6])), "the shape"),
    "sizes that overflow": (build(tensor(shape=[2**40, 2**40])), "too large"),
    "overflow hidden by a zero": (build(tensor(shape=[2**40, 2**40, 0])), "too large"),
    "overflow behind a zero": (build(tensor(shape=[0, 2**40, 2**40], data_offsets=[0, 0]), b""), "too large"),
    "too many dimensions": (build(tensor(shape=[1] * 65, data_offsets=[0, 4]), b"1234"), "the shape"),
    "size beyond 63 bits": (build(tensor(shape=[2**63])), "the shape"),
    "half a byte": (build({"w": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"1"), "whole bytes"),
    "one offset": (build(tensor(data_offsets=[0])), "offsets [0]"),
    "no offsets": (build({"w": {"dtype": "F32", "shape": [6]}}), "offsets None"),
    "offsets backwards": (build(tensor(data_offsets=[24, 0])), "offsets [24, 0]"),
    "negative offset": (build(tensor(data_offsets=[-24, 0])), "offsets"),
    "shape too small": (build(tensor(shape=[2, 2])), "needs 16 bytes and has 24"),
    "a gap at the start": (build(tensor(data_offsets=[8, 32]), b"\0" * 32), "starts at byte 8"),
    "a gap between": (build(two([0, 12], [16, 28]), b"\0" * 28), "'b' starts at byte 16 of the data, expected 12"),
    "an overlap": (build(two([0, 12], [8, 20]), b"\0" * 20), "'b' starts at byte 8 of the data, expected 12"),
    "the same place": (build(two([0, 12], [0, 12]), b"\0" * 12), "starts at byte 0"),
    "data cut": (build(HEADER_AND_DATA, b"\0" * 23), "need 24 bytes, 23 are there"),
    "data missing": (build(HEADER_AND_DATA, b""), "need 24 bytes, 0 are there"),
    "data too long": (build(HEADER_AND_DATA, b"\0" * 25), "1 bytes follow"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_header_refuses_damage_with_file_and_reason(case: str, tmp_path: Path) -> None:
    """Each kind of damage is Corrupt, in one line that names the file and the reason."""
    path = tmp_path / "w.safetensors"
    data, reason = CORRUPT[case]
    path.write_bytes(data)
    with pytest.raises(Corrupt) as caught:
        files.header(path)
    assert str(path) in caught.value.message
    assert reason in caught.value.message
    assert "\n" not in caught.value.message + caught.value.hint


def test_header_agrees_with_the_library_that_the_corpus_is_damaged(tmp_path: Path) -> None:
    """Nothing that the safetensors library refuses is read here."""
    for data, _ in CORRUPT.values():
        try:
            safetensors.numpy.load(data)
        except Exception:  # noqa: BLE001 - whatever the library says no with
            path = tmp_path / "w.safetensors"
            path.write_bytes(data)
            with pytest.raises(Corrupt):
                files.header(path)


def sound() -> bytes:
    """A sound file of several dtypes with metadata."""
    tensors = {
        "a.b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "c": np.ones(3, np.float16),
        "d": np.zeros(0, np.int8),
    }
    return safetensors.numpy.save(tensors, {"vtzoo": '{"schema":1}'})


def test_header_reads_what_the_library_writes(tmp_path: Path) -> None:
    """Metadata, dtypes, shapes and bytes come out as they went in."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(sound())
    found = files.header(path)
    assert found.metadata == {"vtzoo": '{"schema":1}'}
    assert {n: (s.dtype, s.shape) for n, s in found.tensors.items()} == {
        "a.b": ("F32", (2, 3)),
        "c": ("F16", (3,)),
        "d": ("I8", (0,)),
    }
    span = found.tensors["a.b"]
    data = path.read_bytes()[found.data_start :][span.start : span.end]
    assert np.frombuffer(data, np.float32).tolist() == [0, 1, 2, 3, 4, 5]


def test_header_refuses_every_truncation(tmp_path: Path) -> None:
    """A download that stopped anywhere is seen, whichever byte was the last."""
    whole, path = sound(), tmp_path / "w.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(Corrupt):
            files.header(path)


def test_header_survives_flipped_bytes(tmp_path: Path) -> None:
    """A header with any byte changed is read or is Corrupt; nothing else happens."""
    whole, path, draw, refused = sound(), tmp_path / "w.safetensors", random.Random(0), 0
    for _ in range(250):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole) - 30)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            files.header(path)
        except Corrupt:
            refused += 1
    assert 0 < refused < 250


def test_header_names_what_is_no_file(tmp_path: Path) -> None:
    """A missing file is NotFound; a folder or a pipe is refused without waiting for it."""
    with pytest.raises(NotFound, match=r"nothing\.safetensors does not exist"):
        files.header(tmp_path / "nothing.safetensors")
    with pytest.raises(UsageError, match="is a folder"):
        files.header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="no ordinary file"):
        files.sha256(tmp_path / "pipe")


def test_floor_zero_loads_nothing_heavy() -> None:
    """Reading headers and zoos imports neither torch nor numpy nor the safetensors library (platformdirs says where a large index is remembered)."""
    code = (
        "import sys, vtzoo.files, vtzoo.zoo; vtzoo.zoo.Zoo('/nowhere', create=True).entries(); "
        "heavy = {'torch', 'numpy', 'safetensors', 'timm', 'filelock', 'pydantic'}; "
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_safetensors_header_is_read_by_the_library_in_any_order(tmp_path: Path) -> None:
    """The header fits data written in the order given, and its keys are sorted, so equal content gives equal bytes."""
    items = [("z", "F16", (3,)), ("a", "F32", (2,)), ("m", "U8", ())]
    head = files.safetensors_header(items, {"b": "2", "a": "ü"})
    assert len(head) % 8 == 0
    assert head == files.safetensors_header(items, {"a": "ü", "b": "2"})
    data = np.ones(3, np.float16).tobytes() + np.array([5, 6], np.float32).tobytes() + b"\x07"
    loaded = safetensors.numpy.load(head + data)
    assert loaded["a"].tolist() == [5, 6]
    assert int(loaded["m"]) == 7
    (tmp_path / "w").write_bytes(head + data)
    assert files.header(tmp_path / "w").metadata == {"a": "ü", "b": "2"}


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    """The digest of "abc" is the one of FIPS 180-2, from a file as from bytes."""
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256(tmp_path / "abc") == files.sha256_bytes(b"abc") == expected


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_atomic_write_appears_only_when_complete(tmp_path: Path) -> None:
    """Inside the block the place is empty; after it the content is there and nothing else."""
    with files.atomic_write(tmp_path / "a.bin") as out:
        out.write(b"half")
        assert not (tmp_path / "a.bin").exists()
        out.write(b" whole")
    assert listing(tmp_path) == {"a.bin": b"half whole"}


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), GeneratorExit(), MemoryError()])
def test_atomic_write_leaves_nothing_on_any_error(error: BaseException, tmp_path: Path) -> None:
    """Whatever stops the writing, the old content stays and no temporary file does."""
    (tmp_path / "a.bin").write_bytes(b"old")

    def stopped() -> None:
        with files.atomic_write(tmp_path / "a.bin") as out:
            out.write(b"new")
            raise error

    with pytest.raises(type(error)):
        stopped()
    assert listing(tmp_path) == {"a.bin": b"old"}


def test_atomic_write_passes_on_what_is_not_about_the_disk(tmp_path: Path) -> None:
    """An OSError of the block's own work is the caller's to explain."""
    with pytest.raises(ConnectionResetError), files.atomic_write(tmp_path / "a.bin"):
        raise ConnectionResetError
    with pytest.raises(PermissionError, match="source"), files.atomic_write(tmp_path / "a.bin"):
        raise PermissionError(errno.EACCES, "denied", "source")
    assert listing(tmp_path) == {}


def test_atomic_write_refuses_by_guard(tmp_path: Path) -> None:
    """A guard that raises at the last moment leaves the place as it was."""

    def guard() -> None:
        raise Conflict("moved")

    with pytest.raises(Conflict, match="moved"), files.atomic_write(tmp_path / "a", guard=guard) as out:
        out.write(b"x")
    assert listing(tmp_path) == {}


def test_atomic_write_keeps_permissions_and_links(tmp_path: Path) -> None:
    """A replaced file keeps its permissions, a link keeps pointing, a new file can be made read-only."""
    real = tmp_path / "real"
    real.write_bytes(b"old")
    real.chmod(0o640)
    (tmp_path / "link").symlink_to(real)
    files.atomic_text(tmp_path / "link", "new\n")
    assert (tmp_path / "link").is_symlink()
    assert (real.read_bytes(), stat.S_IMODE(real.stat().st_mode)) == (b"new\n", 0o640)
    with files.atomic_write(tmp_path / "object", mode=0o444) as out:
        out.write(b"x")
    assert stat.S_IMODE((tmp_path / "object").stat().st_mode) == 0o444


def test_atomic_write_respects_the_umask(tmp_path: Path) -> None:
    """A new file gets the permissions that any program's would."""
    (tmp_path / "plain").write_bytes(b"")
    files.atomic_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_atomic_write_refuses_impossible_places(tmp_path: Path) -> None:
    """A missing folder, a folder, a pipe and a file used as folder are each named, and nothing is made."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    places = {
        tmp_path / "no" / "a": (NotFound, "mkdir -p"),
        tmp_path: (UsageError, "choose another"),
        tmp_path / "pipe": (UsageError, "choose another"),
        tmp_path / "file" / "a": (UsageError, "choose another"),
        tmp_path / ("x" * 300): (UsageError, "choose another"),
    }
    for place, (refusal, hint) in places.items():
        with pytest.raises(refusal) as caught:
            files.atomic_text(place, "text")
        assert hint in caught.value.hint
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder where nothing can be made")
def test_a_folder_that_takes_no_files_is_not_called_missing() -> None:
    """/proc exists but nobody can make anything in it: the refusal says that, for files and folders."""
    with pytest.raises(UsageError, match="/proc takes no new files"):
        files.atomic_text("/proc/vtzoo", "text")
    with pytest.raises(UsageError, match="/proc takes no new files"), files.atomic_dir("/proc/vtzoo"):
        pass


def test_atomic_write_accepts_the_longest_names(tmp_path: Path) -> None:
    """The temporary name is short enough for any name that the file system takes, in any script."""
    for name in ("x" * 255, "ü" * 127, "漢" * 85):
        files.atomic_text(tmp_path / name, "")
    assert len(listing(tmp_path)) == 3


def test_full_disk_is_resources_and_leaves_nothing(small_disk: Path) -> None:
    """On a file system without room the error is Resources (7), says so, and the old content stays."""
    (small_disk / "a.bin").write_bytes(b"old")
    with pytest.raises(Resources, match="no space left") as caught, files.atomic_write(small_disk / "a.bin") as out:
        out.write(b"x" * 500_000)
    assert caught.value.exit_code == 7
    assert listing(small_disk) == {"a.bin": b"old"}
    with pytest.raises(Resources), files.atomic_dir(small_disk / "folder") as folder:
        (folder / "big").write_bytes(b"x" * 500_000)
    assert listing(small_disk) == {"a.bin": b"old"}


def test_read_only_disk_is_explained(read_only_disk: Path) -> None:
    """Where nothing can be written, the error names the place and what to check."""
    with pytest.raises(VtzooError, match="can't write") as caught:
        files.atomic_text(read_only_disk / "a.bin", "x")
    assert "check the permissions" in caught.value.hint
    with pytest.raises(VtzooError, match="can't write"), files.atomic_dir(read_only_disk / "folder"):
        pass


LIMITED = """
import resource, signal, sys
from vtzoo import files
from vtzoo.errors import Resources
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    with files.atomic_write(sys.argv[1]) as out:
        out.write(b"x" * 50_000)
except Resources as error:
    sys.exit(error.exit_code)
"""


def test_write_failure_of_the_system_is_resources(tmp_path: Path) -> None:
    """A real failing write (a limit on file size) ends as Resources and leaves nothing."""
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path / "a.bin")], check=False)
    assert done.returncode == 7
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_failure_at_the_last_sync_is_resources(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk or quota that turns out full only when the data is synced is Resources too."""

    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Resources):
        files.atomic_text(tmp_path / "a", "text")
    assert listing(tmp_path) == {}


INTERRUPTED = """
import sys, time
from vtzoo import files
with files.atomic_write(sys.argv[1] + "/a.bin") as out:
    out.write(b"x" * 1_000_000)
    with files.atomic_dir(sys.argv[1] + "/folder") as folder:
        (folder / "b").write_bytes(b"y")
        print("ready", flush=True)
        time.sleep(30)
"""


def test_control_c_leaves_nothing(tmp_path: Path) -> None:
    """A real SIGINT while files and folders are being written removes what was begun."""
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as running:
        assert running.stdout is not None
        running.stdout.readline()
        assert len(list(tmp_path.iterdir())) == 2
        running.send_signal(signal.SIGINT)
        assert running.wait(10) != 0
    assert list(tmp_path.iterdir()) == []


def test_atomic_dir_appears_whole(tmp_path: Path) -> None:
    """The folder has its name only once everything in it is written."""
    with files.atomic_dir(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_bytes(b"2")
        files.atomic_text(folder / "a", "1")
        assert not (tmp_path / "out").exists()
        assert folder.parent == tmp_path
    assert listing(tmp_path) == {"out/a": b"1", "out/sub/b": b"2"}


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt()])
def test_atomic_dir_leaves_nothing_on_error(error: BaseException, tmp_path: Path) -> None:
    """Read-only files in it do not keep the unfinished folder alive."""

    def stopped() -> None:
        with files.atomic_dir(tmp_path / "out") as folder:
            with files.atomic_write(folder / "a", mode=0o444) as out:
                out.write(b"x")
            raise error

    with pytest.raises(type(error)):
        stopped()
    assert list(tmp_path.iterdir()) == []


def test_atomic_dir_never_replaces(tmp_path: Path) -> None:
    """A folder, file or dangling link at the place is Conflict, also when it comes while the folder is filled."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        with pytest.raises(Conflict, match="exists already"), files.atomic_dir(tmp_path / name):
            pass
    with pytest.raises(Conflict), files.atomic_dir(tmp_path / "late"):
        (tmp_path / "late").mkdir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "late", "link"]


def test_atomic_write_by_many_at_once_gives_one_whole_file(tmp_path: Path) -> None:
    """Writers of the same place never mix their content and never meet each other's temporary file."""
    code = "import sys; from vtzoo import files\nfor _ in range(40): files.atomic_text(sys.argv[1], sys.argv[2] * 5000)"
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a"), letter]) for letter in "xy"]
    deadline = time.monotonic() + 10
    while any(p.poll() is None for p in running) and time.monotonic() < deadline:
        if (tmp_path / "a").exists():
            assert (tmp_path / "a").read_text() in {"x" * 5000, "y" * 5000}
    assert [p.wait() for p in running] == [0, 0]
    assert len(listing(tmp_path)) == 1
