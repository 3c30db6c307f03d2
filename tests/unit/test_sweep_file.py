"""Sweeps as files: what they add up to, and what is refused."""

import pytest

from vtzoo.errors import NotFound, UsageError
from vtzoo.sweep_file import Asha, read

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
        (HEAD + "methods: linear\ngrid: {lora.rnk: [1]}", "no knob 'rnk'"),
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
        read(HEAD + "methods: linear\ngrid: {lorra.rank: [1]}", "a file")
