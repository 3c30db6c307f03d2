"""Files that are computed once."""

import multiprocessing as mp
import time
from pathlib import Path

import pytest
import torch

from vtzoo.errors import Corrupt
from vtzoo.kept import kept, mapped, place, sound

FACTS = {"what": "numbers", "view": 3}
MADE = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.int32), "c": torch.randn(3, 2).half()}


def test_what_is_made_once_is_read_ever_after(tmp_path: Path) -> None:
    """The same facts give the same tensors without making them again; others make others."""
    asked: list[int] = []

    def make() -> dict[str, torch.Tensor]:
        asked.append(1)
        return MADE

    for _ in range(2):
        found = kept(tmp_path, FACTS, make)
        assert found.keys() == MADE.keys()
        assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in MADE.items())
    assert len(asked) == 1
    kept(tmp_path, {**FACTS, "view": 4}, make)
    assert len(asked) == 2


@pytest.mark.parametrize("damage", ["end", "bit", "header", "empty"])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str) -> None:
    """Cut off, a bit changed, the header or everything gone: it is seen, and mended."""
    kept(tmp_path, FACTS, lambda: MADE)
    path = place(tmp_path, FACTS)
    whole = path.read_bytes()
    bent = bytearray(whole)
    bent[-20] ^= 4
    hurt = {"end": whole[:-3], "bit": bytes(bent), "header": b"\xff" * 9 + whole[9:], "empty": b""}[damage]
    path.chmod(0o644)
    path.write_bytes(hurt)
    assert not sound(path)
    kept(tmp_path, FACTS, lambda: MADE)
    assert path.read_bytes() == whole


def test_what_is_no_number_is_not_kept(tmp_path: Path) -> None:
    """A teacher that gives NaN is refused, and no file is left."""
    with pytest.raises(Corrupt, match="NaN"):
        kept(tmp_path, FACTS, lambda: {"a": torch.tensor([float("nan")])})
    assert not list(tmp_path.glob("*"))


def _slowly(folder: Path, counted: Path) -> None:
    def make() -> dict[str, torch.Tensor]:
        with counted.open("a") as file:
            file.write("x")
        time.sleep(0.3)
        return MADE

    assert torch.equal(kept(folder, FACTS, make)["a"], MADE["a"])


def test_one_of_several_processes_computes_and_the_others_wait(tmp_path: Path) -> None:
    """Three that want the same file at once make it once."""
    folder, counted = tmp_path / "files", tmp_path / "counted"
    context = mp.get_context("fork")
    running = [context.Process(target=_slowly, args=(folder, counted)) for _ in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join(30)
    assert [p.exitcode for p in running] == [0, 0, 0]
    assert counted.read_text() == "x"


def test_mapped_tensors_outlive_the_files_place(tmp_path: Path) -> None:
    """Reading goes on where the file was replaced meanwhile, and writing to what was read changes no file."""
    kept(tmp_path, FACTS, lambda: MADE)
    path = place(tmp_path, FACTS)
    found, before = mapped(path)["a"], path.read_bytes()
    found += 1
    assert path.read_bytes() == before
    path.unlink()
    assert found[1, 2] == 6


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system doesn't list a process's open files")
def test_mapped_files_are_not_kept_open(tmp_path: Path) -> None:
    """Views times blocks may be more files than a process may open: what is mapped is closed."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    held = [kept(tmp_path, {**FACTS, "view": i}, lambda: MADE) for i in range(8)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    assert len(held) == 8
