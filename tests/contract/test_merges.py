"""What every merge promises, over the whole registry of merges, on real deltas of tiny backbones."""

import os
import subprocess
import sys
import weakref
from functools import lru_cache
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vtzoo
from tests import families
from tests.contract.cases import logits, relative
from vtzoo import registry
from vtzoo.anatomy import Site
from vtzoo.delta import Delta, Part
from vtzoo.errors import Conflict, Corrupt, NotFoldable, NotFound, ShapeMismatch, UsageError, VtzooError, WrongBackbone
from vtzoo.fingerprint import base_state
from vtzoo.folding import fold
from vtzoo.graft import tensors_of
from vtzoo.live import attach, extract, head_state, inject, set_head
from vtzoo.merging import plan, renamed
from vtzoo.spec import BackboneCard, Preprocess, Task
from vtzoo.tensors import Lazy

MERGES = registry.names("merges")
SYMMETRIC = [m for m in MERGES if registry.load("merges", m).SYMMETRIC]
CARD = BackboneCard(name="tiny", arch="tiny", fingerprint="sha256:" + "0" * 64)


def neutral(merge: str) -> str:
    """The spec with density and scale at 1."""
    knobs = [k.name for k in registry.card("merges", merge).knobs if k.name in ("density", "scale")]
    return f"{merge}[{','.join(f'{k}=1' for k in knobs)}]" if knobs else merge


@lru_cache(maxsize=None)
def base_of(family: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A tiny backbone's tensors (shared, never changed)."""
    return base_state(families.build(family, dtype=dtype))


@lru_cache(maxsize=None)
def real(spec: str, family: str, task: str = "", dtype: torch.dtype = torch.float32) -> Delta:
    """A delta of a method on a tiny backbone, none of whose tensors is at its start (shared, never changed)."""
    model = inject(families.build(family, dtype=dtype), spec)
    families.perturb(tensors_of(model))
    families.perturb(head_state(model), seed=len(spec))
    name = task or spec.partition("[")[0]
    return extract(model, tasks=[Task(name=name, classes=tuple("abcde"))])


def stored(vectors: dict[str, Tensor], base: dict[str, Tensor], task: str = "t") -> Delta:
    """A `full` delta with these task vectors, and a head that is its own."""
    sites: dict[str, dict[str, list[int]]] = {}
    for name, value in vectors.items():
        module, _, param = name.rpartition(".")
        sites.setdefault(module, {})[param] = list(value.shape)
    places = {n: ".".join([*n.split(".")[:-1], "full", n.rpartition(".")[2]]) for n in vectors}
    tensors = {places[n]: base[n] + v for n, v in vectors.items()}
    tensors[f"@head/{task}/head.weight"] = torch.full((2, 3), float(len(task)))
    part = Part(
        method="full", graft="full",
        sites=tuple(Site(name=m, kind="params", facts={"params": p}) for m, p in sites.items()),
    )  # fmt: skip
    return Delta(method="full", parts=(part,), backbone=CARD, tensors=tensors, tasks=(Task(name=task, classes=("a", "b")),))


def random_deltas(count: int, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> tuple[dict[str, Tensor], list[Delta]]:
    """A random base and random `full` deltas of it."""
    draw = torch.Generator().manual_seed(seed)
    base = {n: torch.randn(s, generator=draw) for n, s in shapes.items()}
    made = [stored({n: torch.randn(s, generator=draw) * 0.1 for n, s in shapes.items()}, base, f"t{i}") for i in range(count)]
    return base, made


def same(a: Delta, b: Delta) -> bool:
    """Whether two deltas hold the same bits under the same names."""
    return sorted(a.tensors) == sorted(b.tensors) and all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)


# ------------------------------------------------------------------------------------------------------------- results
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(
    ("spec", "family"),
    [("lora", "vit"), ("ssf", "resnet"), ("bitfit", "swinv2"), ("full", "vit"), ("lora+bitfit", "convnext"), ("linear", "vit")],
)
def test_one_delta_comes_back(merge, spec, family):
    """One delta, merged with weight 1, density 1 and scale 1, folds to what it folded to alone."""
    base, delta = base_of(family), real(spec, family)
    alone, merged = fold(base, delta), fold(base, vtzoo.merge([delta], neutral(merge), base=base))
    assert sorted(alone) == sorted(merged)
    for name in alone:
        assert (alone[name] - merged[name]).abs().max() <= 1e-6 * alone[name].abs().max(), name


@pytest.mark.parametrize("merge", SYMMETRIC)
def test_symmetric_merges_do_not_depend_on_the_order(merge):
    """Every order of three deltas of different methods, their weights along with them, gives the same bits."""
    base, deltas, coef = base_of("vit"), [real(s, "vit") for s in ("lora", "ssf", "bitfit")], (1.0, 0.5, 0.3)
    first = vtzoo.merge(deltas, merge, base=base, coef=coef)
    for order in permutations(range(3)):
        again = vtzoo.merge([deltas[i] for i in order], merge, base=base, coef=[coef[i] for i in order])
        assert same(first, again)
        assert [t.name for t in again.tasks] == [deltas[i].tasks[0].name for i in order]


@pytest.mark.parametrize("merge", MERGES)
def test_results_do_not_depend_on_threads(merge):
    """One thread and three give the same bits, on tensors that torch divides among threads."""
    base, deltas = random_deltas(3, {"a.weight": (301, 333), "a.bias": (301,)})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = vtzoo.merge(deltas, merge, base=base, coef=(0.3, 0.7, 1.1))
        bits = {n: one.tensors[n] for n in one.tensors}
        torch.set_num_threads(3)
        three = vtzoo.merge(deltas, merge, base=base, coef=(0.3, 0.7, 1.1))
        assert all(torch.equal(bits[n], three.tensors[n]) for n in bits)
    finally:
        torch.set_num_threads(before)


SAVE = """
import sys, torch, vtzoo
from vtzoo.delta import Delta
from vtzoo.tensors import TensorFile
from pathlib import Path
folder = Path(sys.argv[1])
deltas = [Delta.open(folder / f"{i}.safetensors") for i in range(3)]
base = TensorFile(folder / "base.safetensors")
print(vtzoo.merge(deltas, sys.argv[2], base=base).save(folder / f"out{sys.argv[3]}.safetensors"))
"""


@pytest.mark.parametrize("merge", MERGES)
def test_results_do_not_depend_on_the_hash_seed(merge, tmp_path):
    """Two processes with different hash seeds and numbers of threads write the same bytes, from files."""
    from vtzoo.tensors import write

    write(tmp_path / "base.safetensors", base_of("resnet"), {})
    for i, spec in enumerate(("lora", "ssf", "full")):
        real(spec, "resnet").save(tmp_path / f"{i}.safetensors")
    digests = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": seed}
        done = subprocess.run(
            [sys.executable, "-c", SAVE, str(tmp_path), merge, seed], env=env, capture_output=True, text=True, check=True,
            cwd=Path(vtzoo.__file__).parents[1],
        )  # fmt: skip
        digests.add(done.stdout.strip())
    assert len(digests) == 1
    assert len(digests.pop()) == 64


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_deltas_of_different_methods_add_up(family):
    """LoRA, SSF and BitFit, added up by task arithmetic with scale 1, are the sum of what each changes by hand."""
    base = base_of(family, torch.float64)
    deltas = [real(s, family, dtype=torch.float64) for s in ("lora", "ssf", "bitfit")]
    coef = (1.0, 0.5, -0.25)
    merged = fold(base, vtzoo.merge(deltas, "task-arithmetic[scale=1]", base=base, coef=coef), task="")
    folded = [fold(base, d, task="") for d in deltas]
    for name in base:
        wanted = base[name] + sum(c * (f[name] - base[name]) for c, f in zip(coef, folded, strict=True))
        assert relative(wanted, merged[name]) < 1e-6, name
    assert any(not torch.equal(merged[n], base[n]) for n in base)


@pytest.mark.parametrize("merge", MERGES)
def test_absent_tensors_count_as_zero(merge):
    """A delta that leaves a tensor out and one that stores the backbone's own value there merge to the same."""
    base, (a, b) = random_deltas(2, {"a.weight": (7, 5), "b.weight": (3, 4)})
    light = stored({"a.weight": b.tensors["a.full.weight"] - base["a.weight"]}, base, "t1")
    padded = light.with_(
        parts=b.parts, tensors={**light.tensors, "b.full.weight": base["b.weight"].clone()}
    )
    one, two = (vtzoo.merge([a, d], merge, base=base) for d in (light, padded))
    assert same(one, two)


@pytest.mark.parametrize("merge", MERGES)
def test_every_head_travels(merge):
    """A merge keeps each task's classes and head, in the user's order; attached and folded it gives the same logits."""
    base, deltas = base_of("vit"), [real(s, "vit") for s in ("ssf", "lora", "bitfit")]
    merged = vtzoo.merge(deltas, merge, base=base)
    assert [t.name for t in merged.tasks] == ["ssf", "lora", "bitfit"]
    x, model = families.batch("vit", dtype=torch.float32), families.build("vit", dtype=torch.float32)
    attach(model, merged, task="ssf")
    for delta in deltas:
        name = delta.tasks[0].name
        assert all(torch.equal(merged.head(name)[n], delta.head(name)[n]) for n in delta.head(name))
        set_head(model, merged, name)
        plain = families.build("vit", dtype=torch.float32)
        plain.load_state_dict(dict(fold(base, merged, task=name)))
        assert relative(logits(plain, x), logits(model, x)) < 1e-5


@pytest.mark.parametrize("merge", MERGES)
def test_saving_is_deterministic_and_exact(merge, tmp_path):
    """A lazy merge saved twice gives equal files, and opened it has the bits, the spec and the lineage."""
    base, deltas = base_of("vit"), [real("lora", "vit"), real("bitfit", "vit")]
    merged = vtzoo.merge(deltas, merge, base=base, coef=(1, 0.5), layers="blocks.0:0.5", parents=("a", "b"))
    digest = merged.save(tmp_path / "a.safetensors")
    assert digest == merged.save(tmp_path / "b.safetensors")
    opened = Delta.open(tmp_path / "a.safetensors")
    assert same(opened, merged)
    assert opened.method == merge
    assert opened.lineage["parents"] == ["a", "b"]
    assert opened.lineage["coef"] == [1.0, 0.5]
    assert opened.lineage["layers"] == "blocks.0:0.5"


@pytest.mark.parametrize("merge", MERGES)
def test_a_merge_can_be_merged_again(merge):
    """A merge is a delta like others: with another one it merges on, and all heads are there."""
    base = base_of("vit")
    first = vtzoo.merge([real("lora", "vit"), real("ssf", "vit")], merge, base=base)
    second = vtzoo.merge([first, real("bitfit", "vit")], merge, base=base)
    assert [t.name for t in second.tasks] == ["lora", "ssf", "bitfit"]


@pytest.mark.parametrize("merge", MERGES)
def test_layers_scale_the_merged_task_vector(merge):
    """A factor on some layers scales what the merge changes there, and nothing else."""
    base, deltas = random_deltas(2, {f"blocks.{i}.weight": (4, 3) for i in range(3)})
    plainly = fold(base, vtzoo.merge(deltas, merge, base=base), task="")
    scaled = fold(base, vtzoo.merge(deltas, merge, base=base, layers="blocks.1-2:0.5,blocks.2:0"), task="")
    for i, factor in enumerate((1.0, 0.5, 0.0)):
        name = f"blocks.{i}.weight"
        wanted = base[name] + factor * (plainly[name] - base[name])
        assert torch.allclose(scaled[name], wanted, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("merge", MERGES)
def test_half_precision_is_merged_in_float32(merge):
    """A float16 base and bfloat16 deltas merge as their float32 copies do, into float32."""
    base, deltas = random_deltas(2, {"a.weight": (9, 7)})
    low = {n: v.half() for n, v in base.items()}
    halves = [d.with_(tensors={n: v.bfloat16() for n, v in d.tensors.items()}) for d in deltas]
    wide = [d.with_(tensors={n: v.float() for n, v in d.tensors.items()}) for d in halves]
    got = vtzoo.merge(halves, merge, base=low).tensors["a.full.weight"]
    wanted = vtzoo.merge(wide, merge, base={n: v.float() for n, v in low.items()}).tensors["a.full.weight"]
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that operators made and that are alive, and their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, list[int]] = {}
        self.now = self.high = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                self._take(leaf)
        return out

    def _take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        users = self.sizes.setdefault(key, [0, storage.nbytes()])
        self.now += users[1] if not users[0] else 0
        users[0] += 1
        self.high = max(self.high, self.now)
        weakref.finalize(tensor, self._drop, key)

    def _drop(self, key: int) -> None:
        users = self.sizes[key]
        users[0] -= 1
        if not users[0]:
            self.now -= users[1]
            del self.sizes[key]


@pytest.mark.parametrize("merge", MERGES)
def test_memory_does_not_grow_with_tasks(merge, tmp_path):
    """Saving a merge of two deltas and one of eight have the same peak: a dozen times the largest tensor at most."""
    shapes = {f"blocks.{i}.weight": (128, 96) for i in range(12)}
    peaks = []
    for count in (2, 8):
        base, deltas = random_deltas(count, shapes)
        files = [d.with_(tensors=copies(d.tensors)) for d in deltas]
        merged = vtzoo.merge(files, merge, base=copies(base))
        with Peak() as peak:
            merged.save(tmp_path / f"{count}.safetensors")
        peaks.append((peak.high - (1 << 21)) / (128 * 96 * 4))  # the histogram of the selection is not the model's
    assert peaks[0] == pytest.approx(peaks[1], abs=0.5)
    assert peaks[1] < 12


def copies(tensors: dict[str, Tensor]) -> Lazy:
    """Tensors as a file gives them: new ones at every access."""
    return Lazy({n: (lambda v=v: v.clone()) for n, v in tensors.items()}, {n: tuple(v.shape) for n, v in tensors.items()})


# ------------------------------------------------------------------------------------------------------------ refusals
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


@pytest.mark.parametrize("merge", MERGES)
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
        plan(change(deltas), merge, base=base)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(
    "base", [{"a.weight": torch.zeros(7, 6), "pos_embed": torch.zeros(1, 4, 3)}, {"pos_embed": torch.zeros(1, 4, 3)}]
)
def test_another_base_is_refused_unread(merge, base):
    """A base in which a touched tensor has another shape, or is missing, is refused by name."""
    with pytest.raises(ShapeMismatch, match=r"a\.weight"):
        plan(sealed_pair()[1], merge, base=sealed(base))


@pytest.mark.parametrize("merge", MERGES)
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
        plan(deltas, merge, base=base, **facts)


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
        ("ties+linear", UsageError, "names 2 things"),
    ],
)
def test_wrong_specs_are_refused_unread(spec, error, said):
    """Unknown algorithms and knobs, and values out of range, are refused before anything is read."""
    base, deltas = sealed_pair()
    with pytest.raises(error) as caught:
        plan(deltas, spec, base=base)
    assert said in str(caught.value) + caught.value.hint


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(("spec", "family"), [("vpt-shallow", "vit"), ("adapter", "vit"), ("vpt-deep", "vit")])
def test_what_has_no_task_vector_is_refused(merge, spec, family):
    """A delta that changes the architecture or doesn't fold is refused with the reason, beside one that folds."""
    with pytest.raises(NotFoldable) as caught:
        vtzoo.merge([real("lora", family), real(spec, family)], merge, base=base_of(family))
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
    assert "renamed(delta, 't', 't-2')" in caught.value.hint
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


@pytest.mark.parametrize("merge", MERGES)
def test_not_a_number_stops_the_merge_and_leaves_no_file(merge, tmp_path):
    """NaN inside one delta is named (whose, where) when it is met, and no file stays."""
    base, deltas = random_deltas(2, {"a.weight": (7, 5), "b.weight": (7, 5)})
    deltas[1].tensors["b.full.weight"][3, 2] = float("nan")
    with pytest.raises(Corrupt, match=r"delta 2 \(t1\).*b\.weight"):
        vtzoo.merge(deltas, merge, base=base).save(tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("merge", MERGES)
def test_every_merge_says_what_it_is(merge):
    """A merge's file has a paper, says whether it is symmetric and what is neutral, and its knobs have defaults."""
    card, module = registry.card("merges", merge), registry.load("merges", merge)
    assert card.paper.startswith("arXiv:")
    assert f"Symmetric: {'yes' if module.SYMMETRIC else 'no'}" in card.doc
    assert "Neutral:" in card.doc
    assert all(k.default for k in card.knobs)
    assert issubclass(VtzooError, Exception)
