"""What no merge takes: refused with the reason, wherever possible before a tensor is read."""

import pytest
import torch
from torch import Tensor

import vtzoo
from tests import families
from tests.contract.merge_cases import MERGES, base_of, each, joined, random_deltas, real
from vtzoo.delta import Delta, renamed
from vtzoo.errors import Conflict, Corrupt, NotFoldable, NotFound, ShapeMismatch, UsageError, WrongBackbone
from vtzoo.installed import head_state
from vtzoo.live import attach
from vtzoo.merging import plan
from vtzoo.spec import BackboneCard, Preprocess, Task
from vtzoo.tensors import Lazy


def sealed(tensors: dict[str, Tensor]) -> Lazy:
    """Tensors of which only names and shapes may be asked for."""

    def read() -> Tensor:
        pytest.fail("a tensor was read before the refusal")

    return Lazy(dict.fromkeys(tensors, read), {n: tuple(v.shape) for n, v in tensors.items()})


def sealed_pair() -> tuple[Lazy, list[Delta]]:
    """A base and two deltas that can't be read."""
    base, deltas = random_deltas(2, {"a.weight": (7, 5), "pos_embed": (1, 4, 3)})
    return sealed(base), [d.with_(tensors=sealed(d.tensors)) for d in deltas]


def other_backbone(deltas: list[Delta]) -> list[Delta]:
    """The second delta names other weights."""
    card = BackboneCard(name="other", arch="tiny", fingerprint="sha256:" + "1" * 64)
    return [deltas[0], deltas[1].with_(backbone=card)]


def no_fingerprint(deltas: list[Delta]) -> list[Delta]:
    """Neither delta knows its backbone."""
    return [d.with_(backbone=BackboneCard(name="x", arch="x")) for d in deltas]


def other_size(deltas: list[Delta]) -> list[Delta]:
    """The second delta's task has another input size."""
    task = Task(name="t1", classes=("a", "b"), preprocess=Preprocess(input_size=(3, 64, 64)))
    return [deltas[0], deltas[1].with_(tasks=(task,))]


def other_resizing(deltas: list[Delta]) -> list[Delta]:
    """The second delta resizes the position embedding."""
    more = sealed({**dict.fromkeys(deltas[1].tensors, torch.zeros(0)), "@base/pos_embed": torch.zeros(1, 9, 3)})
    return [deltas[0], deltas[1].with_(tensors=more)]


def wrong_shape(deltas: list[Delta]) -> list[Delta]:
    """A tensor of the second delta has another shape than its header says."""
    tensors = {n: torch.zeros(deltas[1].tensors.shape(n)) for n in deltas[1].tensors}
    return [deltas[0], deltas[1].with_(tensors=sealed({**tensors, "a.full.weight": torch.zeros(7, 6)}))]


def missing(deltas: list[Delta]) -> list[Delta]:
    """A tensor of the second delta is missing."""
    tensors = {n: torch.zeros(deltas[1].tensors.shape(n)) for n in deltas[1].tensors if n != "a.full.weight"}
    return [deltas[0], deltas[1].with_(tensors=sealed(tensors))]


@pytest.mark.parametrize("merge", each(MERGES))
@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (other_backbone, WrongBackbone, "other"),
        (no_fingerprint, WrongBackbone, "no fingerprint"),
        (other_size, ShapeMismatch, "64x64"),
        (other_resizing, ShapeMismatch, "pos_embed"),
        (wrong_shape, ShapeMismatch, "a.full.weight"),
        (missing, ShapeMismatch, "is missing"),
        (lambda _: [], UsageError, "nothing to merge"),
    ],
)
def test_what_does_not_belong_together_is_refused_unread(merge, change, error, said):
    """Other backbones, sizes, resizings, shapes and incomplete deltas are refused from their headers alone."""
    base, deltas = sealed_pair()
    with pytest.raises(error, match=said):
        plan(found := change(deltas), merge, base=base, evidence=[{}] * len(found))


@pytest.mark.parametrize("merge", each(MERGES))
@pytest.mark.parametrize(
    "base", [{"a.weight": torch.zeros(7, 6), "pos_embed": torch.zeros(1, 4, 3)}, {"pos_embed": torch.zeros(1, 4, 3)}]
)
def test_another_base_is_refused_unread(merge, base):
    """A base in which a touched tensor has another shape, or is missing, is refused by name."""
    with pytest.raises(ShapeMismatch, match=r"a\.weight"):
        plan(sealed_pair()[1], merge, base=sealed(base), evidence=[{}, {}])


@pytest.mark.parametrize("merge", each(MERGES))
@pytest.mark.parametrize(
    "facts",
    [
        {"coef": (1.0,)}, {"coef": (0.0, 0.0)}, {"coef": (1.0, float("nan"))},
        {"layers": "nowhere:0.3"}, {"layers": "a"}, {"layers": "a:x"}, {"layers": ":1"},
    ],
)  # fmt: skip
def test_wrong_coefficients_and_layers_are_refused_unread(merge, facts):
    """A wrong number of weights, weights that are no numbers or all zero, and layers that match nothing are refused."""
    base, deltas = sealed_pair()
    with pytest.raises(UsageError):
        plan(deltas, merge, base=base, evidence=[{}] * len(deltas), **facts)


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("tiesss", NotFound, "no merge is called"),
        ("ties[dens=0.2]", UsageError, "density"),
        ("ties[density=2]", UsageError, "density"),
        ("ties[density=0]", UsageError, "density"),
        ("ties[scope=layer]", UsageError, "scope"),
        ("task-arithmetic[scale=much]", UsageError, "scale"),
        ("linear[scale=1]", UsageError, "scale"),
        ("ties+linear", UsageError, "2 merges"),
    ],
)
def test_wrong_specs_are_refused_unread(spec, error, said):
    """Unknown algorithms and knobs, and values out of range, are refused before anything is read."""
    base, deltas = sealed_pair()
    with pytest.raises(error) as caught:
        plan(deltas, spec, base=base)
    assert said in str(caught.value) + caught.value.hint


@pytest.mark.parametrize("merge", each(MERGES))
@pytest.mark.parametrize(("spec", "family"), [("vpt-shallow", "vit"), ("adapter", "vit"), ("vpt-deep", "vit")])
def test_what_has_no_task_vector_is_refused(merge, spec, family):
    """A delta that changes the architecture or doesn't fold is refused with the reason, beside one that folds."""
    with pytest.raises(NotFoldable) as caught:
        joined([real("lora", family), real(spec, family)], merge, base=base_of(family))
    assert spec in str(caught.value)
    assert caught.value.hint


def test_heads_of_different_kinds_are_refused():
    """A linear head and a perceptron can't share one delta, since it says once how heads are built."""
    with pytest.raises(NotFoldable, match="linear and mlp-head"):
        vtzoo.merge([real("lora", "vit"), real("lora+mlp-head", "vit")], "linear", base=base_of("vit"))


def test_heads_of_one_kind_travel():
    """Perceptron heads of equal knobs stay what they are: each works on the merged backbone."""
    deltas = [real("lora+mlp-head", "vit", "a"), real("bitfit+mlp-head", "vit", "b")]
    merged = vtzoo.merge(deltas, "linear", base=base_of("vit"))
    model = attach(families.build("vit", dtype=torch.float32), merged, task="b")
    assert all(torch.equal(head_state(model)[n], v) for n, v in deltas[1].head("b").items())


def test_one_task_with_two_heads_is_refused():
    """Two deltas with different heads for one task name are refused; renamed, both travel."""
    base, a, b = base_of("vit"), real("lora", "vit", "t"), real("ssf", "vit", "t")
    with pytest.raises(Conflict) as caught:
        vtzoo.merge([a, b], "linear", base=base)
    assert "vtzoo mv REF NEW --task t=t-2" in caught.value.hint
    merged = vtzoo.merge([a, renamed(b, "t", "t-2")], "linear", base=base)
    assert [t.name for t in merged.tasks] == ["t", "t-2"]
    assert all(torch.equal(merged.head("t-2")[n], v) for n, v in b.head("t").items())
    with pytest.raises(Conflict):
        renamed(merged, "t", "t-2")


def test_one_task_with_one_head_is_kept_once():
    """A task that two deltas have with the same head stands once in the merge."""
    base, a = base_of("vit"), real("lora", "vit")
    both = vtzoo.merge([a, real("ssf", "vit")], "linear", base=base)
    again = vtzoo.merge([both, a], "linear", base=base)
    assert [t.name for t in again.tasks] == ["lora", "ssf"]


@pytest.mark.parametrize("merge", each(MERGES))
def test_not_a_number_stops_the_merge_and_leaves_no_file(merge, tmp_path):
    """NaN inside one delta is named (whose, where) when it is met, and no file stays."""
    base, deltas = random_deltas(2, {"a.weight": (7, 5), "b.weight": (7, 5)})
    deltas[1].tensors["b.full.weight"][3, 2] = float("nan")
    with pytest.raises(Corrupt, match=r"delta 2 \(t1\).*b\.weight"):
        joined(deltas, merge, base=base).save(tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())
