"""Sweeps as files: what they add up to, and what is refused."""

import pytest

from vtzoo.errors import NotFound, UsageError
from vtzoo.sweep_file import Asha, finals, read

HEAD = "name: try\ntasks: {fashion: 'vtzoo:fashion', emoji: 'vtzoo:emoji'}\nbackbones: small\n"


def test_every_combination_once() -> None:
    """Tasks, methods, knobs and seeds multiply; what comes out twice is one run."""
    text = HEAD + "methods: [linear, lora]\nseeds: [0, 1]\ngrid: {lr: [1e-3, 1e-2], lora.rank: [2, 4]}\n"
    cells = read(text, "a file").cells
    assert len(cells) == 2 * 2 * 2 * (1 + 2)  # linear has no rank
    assert {c.method for c in cells} == {"linear", "lora[rank=2]", "lora[rank=4]"}
    assert {c.recipe["lr"] for c in cells} == {1e-3, 1e-2}


def test_blocks_inherit() -> None:
    """A block's recipe adds to the one above, its tasks are chosen from those above, the rest replaces."""
    text = HEAD + (
        "recipe: {epochs: 2, lr: 1e-3}\nruns:\n- methods: linear\n"
        "- {methods: [ssf], backbones: [other], tasks: [emoji], seeds: [5], recipe: {lr: 1e-2}}\n"
    )
    cells = read(text, "a file").cells
    assert [(c.task, c.backbone, c.method, c.seed) for c in cells] == [
        ("fashion", "small", "linear", 0), ("emoji", "small", "linear", 0), ("emoji", "other", "ssf", 5),
    ]  # fmt: skip
    assert cells[-1].recipe == {"epochs": 2, "lr": 1e-2}


def test_a_run_is_what_it_depends_on() -> None:
    """The digest is the same however a number is written, and another for each thing that changes the result."""
    one, same, other = (
        read(HEAD + f"methods: linear\nrecipe: {{lr: {lr}}}", "a file").cells[0] for lr in ("1e-3", 0.001, 0.002)
    )
    assert one.digest("f", "i") == same.digest("f", "i")
    digests = {one.digest("f", "i"), other.digest("f", "i"), one.digest("g", "i"), one.digest("f", "j")}
    assert len(digests) == 4
    ways = [read(HEAD + f"methods: '{m}'", "a file").cells[0] for m in ("lora[rank=4,alpha=8]", "lora[alpha=8,rank=4]")]
    assert ways[0] == ways[1]
    assert one.name(one.digest("f", "i")) == f"fashion/linear-{one.digest('f', 'i')[:10]}"


def test_variables_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data may stand under a folder that the environment names."""
    monkeypatch.setenv("IMAGES", "/images")
    text = "name: try\ntasks: {a: $IMAGES/a}\nbackbones: small\nmethods: linear\nengine: {asha: {grace_epochs: 2}}\n"
    sweep = read(text, "a file")
    assert sweep.cells[0].data == "/images/a"
    assert sweep.engine.asha == Asha(grace_epochs=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "no mapping"),
        ("name: [", "no YAML"),
        (HEAD + "methods: linear\ntaks: {}", "did you mean tasks"),
        (HEAD, "has no methods"),
        (HEAD + "methods: linear\nrecipe: {lrr: 1}", "no knob 'lrr'"),
        (HEAD + "methods: linear\nrecipe: {seed: 1}", "seed stands among"),
        (HEAD + "methods: linear\ngrid: {lr: 1e-3}", "valid list"),
        (HEAD + "methods: lora\ngrid: {lora.rnk: [1]}", "no knob 'rnk'"),
        (HEAD + "methods: linear\ngrid: {lora.rank: [1]}", "no method is lora"),
        (HEAD + "methods: ['lora[rank=2]']\ngrid: {lora.rank: [1]}", "has rank of its own"),
        (HEAD + "methods: linear\ngrid: {lr: []}", "grid.lr is empty"),
        (HEAD + "methods: linear\nfinal: {seeds: []}", "final has no seeds"),
        (HEAD + "methods: linear\nrecipe: {eval_on: test}\nfinal: {}", "none are measured"),
        (HEAD + "methods: linear\nrecipe: {eval_on: val}\nfinal: {recipe: {train_on: train+val}}", "nothing is left"),
        (HEAD + "methods: linear\nrecipe: {patience: 2}\nfinal: {recipe: {train_on: train+val}}", "patience looks at"),
        (
            HEAD + "methods: 'linear[lr=[1e-3,1e-2]]'\nfinal: {recipe: {train_on: train+val, eval_on: test}}",
            "chooses on validation images, and finals measure none",
        ),
        (HEAD + "methods: linear\nseeds: 5", "seeds is no list"),
        (HEAD + "methods: linear\nfinal: {seeds: 3}", "final: seeds is no list"),
        (HEAD + "methods: linear\nruns: [{seeds: 2}]", "run 1: seeds is no list"),
        (
            "name: try\nbackbones: b\nmethods: linear\nruns: [{tasks: {a: b}}, {tasks: {a: c}}]",
            "the task 'a' is b and c",
        ),
        (HEAD.replace("name: try", "") + "methods: linear", "has no name"),
        (HEAD + "methods: linear\nruns: [{tasks: [fasion]}]", "no task 'fasion'"),
        (HEAD + "methods: linear\nengine: {asha: {reduction: 1}}", "asha.reduction"),
        ("name: try\ntasks: {a: $UNSET_ANYWHERE/a}\nbackbones: b\nmethods: linear", r"\$UNSET_ANYWHERE is not set"),
        ("name: Try It\ntasks: {a: b}\nbackbones: b\nmethods: linear", "no legal name"),
    ],
)
def test_refusals(text: str, said: str) -> None:
    """What can't be meant is said with the place where it stands."""
    with pytest.raises(UsageError, match=said):
        read(text, "a file")


def test_an_unknown_method_is_not_found() -> None:
    """A knob of a method that nobody knows is met before anything runs."""
    with pytest.raises(NotFound, match="lorra"):
        read(HEAD + "methods: lorra\ngrid: {lorra.rank: [1]}", "a file")


def test_finals_are_chosen_over_seeds_and_folds() -> None:
    """The best mean wins, not the best run; a fold is no knob, and the finals have none."""
    text = (
        HEAD
        + "methods: lora\nrecipe: {folds: 2}\nseeds: [0, 1]\ngrid: {fold: [0, 1], lora.rank: [2, 4]}\nfinal: {seeds: [7, 8]}\n"
    )
    sweep = read(text, "a file")
    scores = [
        {"lora[rank=2]": 0.5, "lora[rank=4]": 0.6 if c.seed else 0.3}[c.method] + 0.2 * c.recipe["fold"]
        for c in sweep.cells
    ]
    found = finals(sweep, scores)
    assert [(c.task, c.method, c.seed) for c in found] == [
        (task, "lora[rank=2]", seed) for task in ("fashion", "emoji") for seed in (7, 8)
    ]
    assert all(c.recipe == {} and c.stack == "lora" for c in found)
