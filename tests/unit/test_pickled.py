import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from vtzoo.errors import Corrupt, Mismatch, NotFound
from vtzoo.files import header, safetensors_header
from vtzoo.pickled import is_pickled, unpickled
from vtzoo.tensors import TensorFile

WEIGHTS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.ones(2, dtype=torch.float16),
    "n": torch.tensor(3),
}


class Trap:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch sprung",)


def test_tensors_come_out_of_a_trained_models_checkpoint(tmp_path: Path) -> None:
    """The weights among other things, by their names, bit for bit; the file in between is gone afterwards."""
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": t for n, t in WEIGHTS.items()}}, tmp_path / "w.pth")
    with unpickled(tmp_path / "w.pth", allowed=True) as plain:
        found = dict(TensorFile(plain))
    assert not plain.exists()
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in WEIGHTS.items())


@pytest.mark.parametrize("trap", [Trap(), {"a": Trap(), "w": torch.ones(2)}])
def test_what_a_pickle_would_run_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: object) -> None:
    """Nor with the flag: Corrupt, and no trap springs."""
    monkeypatch.chdir(tmp_path)
    torch.save(trap, "w.bin")
    with pytest.raises(Corrupt, match=r"would look up posix\.system"), unpickled(Path("w.bin"), allowed=True):
        pass
    assert not Path("sprung").exists()


def test_a_pickle_is_refused_unless_someone_says_so(tmp_path: Path) -> None:
    """By its content or its suffix; the hint names the flag. Other files are given as they are."""
    for name, content in (("w.pth", b"x"), ("w.safetensors", pickle.dumps(1)), ("w.bin", b"PK\x03\x04")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Mismatch, match="is a pickle") as caught, unpickled(tmp_path / name, allowed=False):
            pass
        assert "--from-pickle" in caught.value.hint
    with pytest.raises(NotFound), unpickled(tmp_path / "nowhere", allowed=True):
        pass


def test_a_header_whose_length_looks_like_a_pickle_is_none(tmp_path: Path) -> None:
    """The length of 640 bytes is written as a pickle's start."""
    size = next(n for n in range(700) if len(safetensors_header([], {"a": "b" * n})) == 648)
    path = tmp_path / "w.bin"
    path.write_bytes(safetensors_header([], {"a": "b" * size}))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert not is_pickled(path)
    assert header(path).metadata
    with unpickled(path, allowed=False) as plain:
        assert plain == path
