"""registry.py: the folder is the registry."""

import subprocess
import sys
from pathlib import Path

import pytest

import vtzoo
from vtzoo import registry
from vtzoo.errors import NotFound

ROOT = Path(vtzoo.__file__).parent


@pytest.mark.parametrize("kind", ["methods", "merges", "losses", "inits"])
def test_names_are_the_files(kind: str) -> None:
    """Every file without an underscore is an entry, with dashes for underscores, sorted."""
    files = sorted(p.stem.replace("_", "-") for p in (ROOT / kind).glob("*.py") if not p.stem.startswith("_"))
    assert registry.names(kind) == files


def test_unknown_name_suggests_the_nearest() -> None:
    """A mistyped method is not found, with a suggestion."""
    for ask in (registry.load, registry.card):
        with pytest.raises(NotFound, match="lroa") as refusal:
            ask("methods", "lroa")
        assert "lora" in refusal.value.hint


def test_card_says_what_the_file_says() -> None:
    """Summary, group, paper, fold line and knobs with types and defaults come from the source."""
    card = registry.card("methods", "lora")
    module = registry.load("methods", "lora")
    assert (card.group, card.paper) == (module.GROUP, module.PAPER)
    assert card.summary.startswith("LoRA: ")
    assert card.folds == "exactly"
    rank = next(k for k in card.knobs if k.name == "rank")
    assert rank.default == "8"
    assert "int" in rank.type
    assert [k.name for k in card.knobs] == list(module.Config.__dataclass_fields__)


def test_cards_have_the_knobs_that_methods_share() -> None:
    """Of every method the knobs are its Config's own, also those that it takes over from a helper, with the defaults that hold."""
    for card in registry.cards("methods"):
        fields = registry.load("methods", card.name).Config.__dataclass_fields__
        assert [k.name for k in card.knobs] == list(fields), card.name
    defaults = {k.name: k.default for k in registry.card("methods", "ape").knobs}
    assert (defaults["alpha"], defaults["scale"]) == ("2.0", "100.0")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Folds: exactly.  Identity at init: yes.", "exactly"),
        ("Folds: no: it bends\n    in the middle.  Identity at init: yes.", "no: it bends in the middle"),
        ("Folds: exactly (as x; y).\nNext: z.", "exactly (as x; y)"),
        ("Nothing of the sort.", ""),
    ],
)
def test_fold_line_is_read_from_the_docstring(tmp_path: Path, text: str, said: str) -> None:
    """The line ends at its full stop, however it is wrapped."""
    file = tmp_path / "toy.py"
    file.write_text(f'"""Toy.\n\n    {text}\n"""\n')
    assert registry._read("toy", file).folds == said


def test_cards_run_no_method(tmp_path: Path) -> None:
    """Listing every card of every kind imports neither torch nor any of the files."""
    code = (
        "import sys; from vtzoo import registry\n"
        "n = sum(len(registry.cards(k)) for k in ('methods', 'merges', 'losses', 'inits'))\n"
        "heavy = [m for m in sys.modules if m.split('.')[0] in ('torch', 'timm', 'numpy') or m.startswith('vtzoo.methods.')]\n"
        "print(n, heavy)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    ).stdout
    count, heavy = out.split(maxsplit=1)
    assert int(count) >= 15
    assert heavy.strip() == "[]"
