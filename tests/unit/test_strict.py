import json
import re
from pathlib import Path

import pytest

from vtzoo import strict
from vtzoo.documents import document
from vtzoo.errors import Corrupt, Mismatch, NotFound, UsageError
from vtzoo.files import safetensors_header
from vtzoo.headers import read_header
from vtzoo.spec import BackboneCard, Preprocess, Task

FACTS = {"input_size": [3, 8, 8], "mean": [0.5], "std": [0.5]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no JSON"), ("[1,]", "is no JSON"), (b"\xff", "is not UTF-8"), ('{"a": 1, "a": 2}', "says 'a' twice"), ("[" * 33 + "]" * 33, "nested too deeply"),
        ("[" * 10**5, "nested too deeply"), (" " * (8 << 20) + "1", "(the limit is 8388608)"), ("9" * 5000, "limit"),
    ],
)  # fmt: skip
def test_what_is_refused_starts_with_a_verb(text: str, said: str) -> None:
    """So that a caller puts the file's name before it."""
    with pytest.raises(ValueError, match=re.escape(said)):
        strict.loads(text)


def test_what_is_json_is_read() -> None:
    """To 32 levels; NaN among metrics, as Python writes it, too."""
    assert strict.loads("[" * 32 + "1" + "]" * 32)
    assert strict.record('{"top1": NaN}')["top1"] != strict.record("{}")
    with pytest.raises(ValueError, match="no JSON object"):
        strict.record("[]")


def test_files_are_read_by_their_name(tmp_path: Path) -> None:
    """Damage names the file; a missing file is NotFound, a folder UsageError."""
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(Corrupt, match=r"a\.json is no JSON"):
        document(tmp_path / "a.json")
    with pytest.raises(NotFound):
        document(tmp_path / "b.json")
    with pytest.raises(UsageError):
        document(tmp_path)


def test_a_writer_refuses_what_no_reader_takes() -> None:
    """A header of more than 8 MB."""
    with pytest.raises(UsageError, match="the limit is 8388608"):
        safetensors_header([], {"a": "b" * (8 << 20)})


@pytest.mark.parametrize(("schema", "error"), [(2, Mismatch), (10**30, Mismatch), (0, Corrupt), (True, Corrupt), ("1", Corrupt), (None, Corrupt), (1.0, Corrupt)])  # fmt: skip
def test_schemas(tmp_path: Path, schema: object, error: type[Exception]) -> None:
    """A newer one is refused by name, what is none as damage."""
    path = tmp_path / "d.safetensors"
    path.write_bytes(safetensors_header([], {"vtzoo": json.dumps({"schema": schema})}))
    with pytest.raises(error):
        read_header(path)


@pytest.mark.parametrize(
    "change",
    [
        {"input_size": [3, 8]}, {"input_size": [3, 0, 8]}, {"input_size": [3, 1 << 17, 8]}, {"input_size": [3.0, 8, 8]}, {"input_size": 8}, {"mean": "x"}, {"mean": []}, {"mean": ["a"]},
        {"mean": [float("inf")]}, {"mean": [0.1, 0.2]}, {"std": [0]}, {"crop_pct": 0}, {"crop_pct": "1"}, {"crop_pct": float("nan")}, {"interpolation": 3}, {"crop_mode": []},
    ],
)  # fmt: skip
def test_preprocessing_that_no_image_can_have(change: dict) -> None:
    """Corrupt, before anything is computed with it."""
    assert Preprocess.of(FACTS).input_size == (3, 8, 8)
    with pytest.raises(Corrupt):
        Preprocess.of({**FACTS, **change})


@pytest.mark.parametrize(
    "change", [{"name": ""}, {"name": 3}, {"name": "x" * 256}, {"classes": "ab"}, {"classes": [{}]}, {"classes": 3}]
)
def test_tasks_that_are_none(change: dict) -> None:
    """A name that is a text, and labels in a list."""
    with pytest.raises(Corrupt):
        Task.of({**FACTS, "name": "a", "classes": ["b"], **change})


@pytest.mark.parametrize(
    "change",
    [
        {"arch": 3}, {"source": []}, {"head": "x"}, {"head": [3]}, {"model_args": []}, {"params": "x"}, {"license": {}}, {"model_args": {"checkpoint_path": "x"}},
        {"model_args": {"pretrained_cfg_overlay": {}}}, {"model_args": {"embed_dim": 1 << 17}}, {"model_args": {"depths": [1, 1 << 17]}}, {"model_args": {"drop_rate": float("nan")}},
    ],
)  # fmt: skip
def test_backbones_that_are_none(change: dict) -> None:
    """Fields of other kinds, arguments that read files, sizes without end; what is null counts as left out."""
    assert BackboneCard.of("a", {**FACTS, "arch": "b", "license": None}).license == ""
    with pytest.raises(Corrupt):
        BackboneCard.of("a", {**FACTS, "arch": "b", **change})
