"""Deltas whose header tells of other tensors than their file holds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import vtzoo
from tests.e2e.chain import ran
from vtzoo.files import header, safetensors_header
from vtzoo.zoo import Zoo


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with a LoRA and an SSF of one backbone."""
    root = tmp_path_factory.mktemp("made")
    zoo = Zoo.init(root / "zoo")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), root / "vit.safetensors")
    assert (
        ran("--zoo", zoo.root, "add", "backbone", "tiny", "--arch", "test_vit", "--weights", root / "vit.safetensors")
        == 0
    )
    for name, method in (("pets/lora", "lora[rank=2]"), ("cars/ssf", "ssf")):
        model = vtzoo.build("tiny", zoo=zoo, num_classes=2)
        vtzoo.inject(model, method)
        digest = vtzoo.extract(model, task=name[:4], classes=["a", "b"]).save(root / "d.safetensors")
        zoo.add_object(root / "d.safetensors")
        zoo.put("deltas", name, {"digest": digest, "tasks": [name[:4]]})
    return root


def _garbled(place: Path, tensors: str, said: str, change: Callable[[dict[str, Any]], object]) -> None:
    """An entry `odd`: the tensors of one delta under the changed header of another."""
    zoo = Zoo(place / "zoo")
    own, other = (zoo.object(zoo.resolve(n).digest) for n in (tensors, said))
    found, document = header(own), json.loads(header(other).metadata["vtzoo"])
    change(document["config"]["parts"][0])
    rows = sorted(found.tensors.items(), key=lambda row: row[1].start)
    head = safetensors_header([(n, s.dtype, s.shape) for n, s in rows], {"vtzoo": json.dumps(document)})
    zoo.put("deltas", "odd", {"digest": zoo.add_object(head + own.read_bytes()[found.data_start :])}, replace=True)


@pytest.mark.parametrize(
    ("tensors", "said", "change"),
    [
        ("cars/ssf", "pets/lora", lambda _: None),
        ("pets/lora", "pets/lora", lambda part: part["sites"].pop()),
        ("pets/lora", "pets/lora", lambda part: part["sites"][0].update(shape=[-1, 64])),
        ("cars/ssf", "cars/ssf", lambda part: part["sites"][0].update(shape=[])),
        ("cars/ssf", "cars/ssf", lambda part: part["sites"][0].update(facts=[])),
    ],
)
def test_a_delta_whose_header_tells_of_other_tensors(
    made: Path, tensors: str, said: str, change: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is neither compared nor merged (4): what isn't told of would silently count as nothing."""
    _garbled(made, tensors, said, change)
    at = ("--zoo", made / "zoo")
    for words in (
        ("diff", "odd", "pets/lora"),
        ("diff", "tiny", "odd"),
        ("merge", "odd", "pets/lora", "--method", "ties", "--name", "m"),
        ("fold", "odd", "--out", tmp_path / "o"),
    ):
        assert ran(*at, *words) == 4, words
        assert len(capsys.readouterr().err.strip().splitlines()) == 2
