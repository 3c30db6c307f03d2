"""What earlier versions wrote is opened for ever: the same files, the same answers. `scripts/make_compat.py` froze it, once with each release."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from scripts.make_compat import TASKS, batch
from vtzoo.artifact import go_live, open_ref
from vtzoo.errors import Mismatch
from vtzoo.files import header, safetensors_header
from vtzoo.headers import read_header
from vtzoo.verbs.verify import verify
from vtzoo.zoo import Zoo
from vtzoo_cli._main import main

VERSIONS = sorted(p for p in Path(__file__).parent.iterdir() if (p / "answers.json").is_file())
TOLERANCE, MOST_BYTES = 1e-5, 10**6


@pytest.fixture(params=VERSIONS, ids=lambda p: p.name)
def frozen(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Zoo, dict, Path]:
    """A version's zoo, copied (git keeps no modes), its answers and its key."""
    shutil.copytree(request.param / "zoo", tmp_path / "zoo")
    for place in (tmp_path / "zoo" / ".vtzoo" / "objects").rglob("*"):
        if place.is_file():
            place.chmod(0o444)
    answers = json.loads((request.param / "answers.json").read_text(encoding="utf-8"))
    return Zoo(tmp_path / "zoo"), answers, request.param / "key.pub"


def test_every_entry_is_there_whole_and_signed_as_it_was(frozen: tuple[Zoo, dict, Path]) -> None:
    """The same names, sections and digests; what each file says of itself; the signature."""
    zoo, answers, key = frozen
    own = {e.name: (e.section, sorted(e.objects)) for e in zoo.entries() if not e.builtin}
    assert own == {name: (a["section"], a["objects"]) for name, a in answers.items()}
    found = verify(public_key=key, zoo=zoo)
    assert not [r for r in found.rows if r["wrong"]]
    assert found.report["signed"] == 1


def test_every_entry_answers_as_it_did(frozen: tuple[Zoo, dict, Path]) -> None:
    """Backbone, deltas, merge, folded model, student and ONNX file: logits within 1e-5 of the largest, the same labels and licence."""
    zoo, answers, _ = frozen
    kinds = {(a["section"], e.facts.get("kind", "")) for e, a in ((zoo.resolve(n), a) for n, a in answers.items())}
    assert kinds >= {
        ("backbones", ""),
        ("deltas", ""),
        ("models", "folded"),
        ("models", "student"),
        ("models", "export"),
    }
    for name, told in answers.items():
        live = go_live(open_ref(name, zoo, exports=True), TASKS.get(name))
        with torch.inference_mode():
            logits = live.model(batch())
        wanted = torch.tensor(told["logits"])
        assert (logits - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), name
        assert (list(live.task.classes) if live.task else []) == told["classes"]
        assert live.card.license == told["license"]


def test_its_files_open_without_the_index(frozen: tuple[Zoo, dict, Path], tmp_path: Path) -> None:
    """A delta by its path, and the command line's list and page."""
    zoo, _, _ = frozen
    copy = tmp_path / "d.safetensors"
    shutil.copy(zoo.object(zoo.resolve("emoji/lora").digest), copy)
    assert open_ref(str(copy), zoo).task(None)
    for words in (["ls"], ["show", "emoji/lora"], ["show", "emoji/onnx"], ["show", str(copy)]):
        assert main(["--zoo", str(zoo.root), *words]) == 0


def test_what_is_frozen_is_small() -> None:
    """Of all versions together under 1 MB."""
    assert VERSIONS
    assert sum(p.stat().st_size for v in VERSIONS for p in v.rglob("*") if p.is_file()) < MOST_BYTES


def test_a_newer_schema_is_refused_by_name(frozen: tuple[Zoo, dict, Path], tmp_path: Path) -> None:
    """In the index and in a header: Mismatch, which both numbers and how to get a newer vtzoo."""
    zoo, _, _ = frozen
    index = zoo.root / "zoo_index.yaml"
    index.write_text(index.read_text(encoding="utf-8").replace("schema: 1", "schema: 2"), encoding="utf-8")
    own = zoo.root / ".vtzoo" / "objects" / "sha256"
    delta = next(
        p for p in own.rglob("*") if p.is_file() and p.read_bytes()[8:9] == b"{" and "vtzoo" in header(p).metadata
    )
    newer = safetensors_header([], {"vtzoo": json.dumps({**read_header(delta), "schema": 2})})
    (tmp_path / "new.safetensors").write_bytes(newer)
    for refused in (zoo.entries, lambda: read_header(tmp_path / "new.safetensors")):
        with pytest.raises(Mismatch, match="schema 2, this vtzoo knows up to 1") as caught:
            refused()
        assert (caught.value.exit_code, caught.value.hint) == (4, "pip install -U vtzoo")
