"""What every merge promises, over the whole registry of merges, on real deltas of tiny backbones."""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vtzoo
from tests import families
from tests.contract.cases import logits, relative
from tests.contract.merge_cases import (
    CHAINS,
    MASKED,
    MERGES,
    NEUTRAL,
    SYMMETRIC,
    base_of,
    copies,
    each,
    joined,
    neutral,
    random_deltas,
    real,
    same,
    some,
    stored,
)  # fmt: skip
from vtzoo import registry
from vtzoo.delta import BASE, Delta
from vtzoo.errors import NotFoldable, ShapeMismatch, UsageError
from vtzoo.folding import fold
from vtzoo.installed import set_head
from vtzoo.live import attach, detach
from vtzoo.masks import MASK, SCALE
from vtzoo.tensors import write


# ------------------------------------------------------------------------------------------------------------- results
@pytest.mark.parametrize("merge", each(NEUTRAL))
@pytest.mark.parametrize(
    ("spec", "family"),
    [
        ("lora", "vit"),
        ("ssf", "resnet"),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("bitfit", "swinv2"),
                ("full", "vit"),
                ("lora+bitfit", "convnext"),
                ("linear", "vit"),
                ("pixel-prompt", "vit"),
                ("repadapter", "vit"),
                ("residual", "resnet"),
            )
        ],
    ],
)
def test_one_delta_comes_back(merge, spec, family):
    """One delta, merged with weight 1, density 1 and scale 1, folds to what it folded to alone."""
    base, delta = base_of(family), real(spec, family)
    alone, merged = fold(base, delta), fold(base, joined([delta], neutral(merge), base=base))
    assert sorted(alone) == sorted(merged)
    for name in alone:
        assert (alone[name] - merged[name]).abs().max() <= 1e-6 * alone[name].abs().max(), name


@pytest.mark.parametrize("merge", each([*SYMMETRIC, *CHAINS]))
def test_symmetric_merges_do_not_depend_on_the_order(merge):
    """Other orders of three deltas of different methods, their weights along with them, gives the same bits."""
    base, deltas, coef = base_of("vit"), [real(s, "vit") for s in ("lora", "ssf", "bitfit")], (1.0, 0.5, 0.3)
    first = joined(deltas, merge, base=base, coef=coef)
    for order in ((1, 0, 2), (2, 1, 0), (1, 2, 0)):
        again = joined([deltas[i] for i in order], merge, base=base, coef=[coef[i] for i in order])
        masked = [n for n in first.tensors if n.startswith((MASK, SCALE))]
        assert all(torch.equal(first.tensors[n][list(order)], again.tensors[n]) for n in masked)  # one row a task
        assert same(first, again, besides=masked)
        assert [t.name for t in again.tasks] == [deltas[i].tasks[0].name for i in order]


@pytest.mark.parametrize("merge", each([*MERGES, *CHAINS]))
def test_results_do_not_depend_on_threads(merge, tmp_path):
    """One thread and three, one worker and two give the same bits, on tensors that torch divides among threads."""
    base, deltas = random_deltas(3, {"a.weight": (101, 133), "a.bias": (101,), "b.weight": (77, 40), "b.bias": (77,)})
    deltas = some(merge, deltas)
    coef, before = (0.3, 0.7, 1.1)[: len(deltas)], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = joined(deltas, merge, base=base, coef=coef)
        bits = {n: one.tensors[n] for n in one.tensors}
        torch.set_num_threads(3)
        three = joined(deltas, merge, base=base, coef=coef)
        assert all(torch.equal(bits[n], three.tensors[n]) for n in bits)
        digests = {three.save(tmp_path / f"{n}.safetensors", workers=n) for n in (1, 2, 5)}
        assert len(digests) == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


SPECTRAL = ("ace", "cart", "core", "esm", "iso-c", "iso-cts", "knots", "svc", "svd", "tsv", "wudi")
WIDE = (*SPECTRAL, "fisher", "regmean", "regmean-plus")
"""They compute in float64."""
SAVE = """
import sys
from pathlib import Path
import vtzoo
from vtzoo.delta import Delta
from vtzoo.tensors import TensorFile
folder = Path(sys.argv[1])
deltas = [Delta.open(folder / f"{i}.safetensors") for i in range(3)]
base = TensorFile(folder / "base.safetensors")
for merge in sys.argv[2:]:
    count = 2 if merge == "slerp" else 3
    print(vtzoo.merge(deltas[:count], merge, base=base).save(folder / "out.safetensors", workers=2))
"""


def test_results_do_not_depend_on_the_process(tmp_path):
    """Another process with another hash seed and number of threads, and from files, writes the same bytes."""
    base, deltas = base_of("resnet"), [real(spec, "resnet") for spec in ("lora", "ssf", "full")]
    write(tmp_path / "base.safetensors", base, {})
    for i, delta in enumerate(deltas):
        delta.save(tmp_path / f"{i}.safetensors")
    specs = ["linear", "slerp", "iso-cts", "karcher", *CHAINS]
    here = [vtzoo.merge(some(m, deltas), m, base=base).save(tmp_path / "here.safetensors") for m in specs]
    done = subprocess.run(
        [sys.executable, "-c", SAVE, str(tmp_path), *specs], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "5", "OMP_NUM_THREADS": "2"}, cwd=Path(vtzoo.__file__).parents[1],
    )  # fmt: skip
    assert done.stdout.split() == here


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_deltas_of_different_methods_add_up(family):
    """LoRA, SSF and BitFit, added up by task arithmetic with scale 1, are the sum of what each changes by hand."""
    base = base_of(family, torch.float64)
    deltas = [real(s, family, dtype=torch.float64) for s in ("lora", "ssf", "bitfit")]
    coef = (1.0, 0.5, -0.25)
    merged = fold(base, vtzoo.merge(deltas, "task-arithmetic[scale=1]", base=base, coef=coef), task="")
    folded = [fold(base, d, task="") for d in deltas]
    for name in (n for n in base if base[n].is_floating_point()):
        wanted = base[name] + sum(c * (f[name] - base[name]) for c, f in zip(coef, folded, strict=True))
        assert torch.allclose(wanted, merged[name], rtol=0, atol=1e-6 * float(wanted.abs().max())), name
    assert any(not torch.equal(merged[n], base[n]) for n in base)


@pytest.mark.parametrize("merge", each([*(m for m in MERGES if m != "slerp"), *CHAINS]))
def test_a_task_without_weight_takes_no_part(merge):
    """With the coefficient 0 a delta changes no tensor; its head still travels."""
    base, deltas = base_of("vit"), [real(s, "vit") for s in ("lora", "bitfit", "full")]
    two, three = joined(deltas[:2], merge, base=base), joined(deltas, merge, base=base, coef=(1, 1, 0))
    assert {t.name for t in three.tasks} == {"lora", "bitfit", "full"}
    few, many = (fold(base, d, task="lora" if merge in MASKED else "") for d in (two, three))
    assert all(torch.equal(few[n], many[n]) for n in base)


@pytest.mark.parametrize("merge", each([*MERGES, *CHAINS]))
def test_absent_tensors_count_as_zero(merge):
    """A delta that leaves a tensor out and one that stores the backbone's own value there merge to the same."""
    base, (a, b) = random_deltas(2, {"a.weight": (7, 5), "b.weight": (3, 4)})
    light = stored({"a.weight": b.tensors["a.full.weight"] - base["a.weight"]}, base, "t1")
    padded = light.with_(parts=b.parts, tensors={**light.tensors, "b.full.weight": base["b.weight"].clone()})
    one, two = (joined([a, d], merge, base=base) for d in (light, padded))
    assert same(one, two)


@pytest.mark.parametrize("merge", each(MERGES))
def test_every_head_travels(merge):
    """A merge keeps each task's classes and head, in the user's order; attached and folded it gives the same logits."""
    base, deltas = base_of("vit"), some(merge, [real(s, "vit") for s in ("ssf", "lora", "bitfit")])
    merged = joined(deltas, merge, base=base)
    assert [t.name for t in merged.tasks] == ["ssf", "lora", "bitfit"][: len(deltas)]
    x, model = families.batch("vit", dtype=torch.float32), families.build("vit", dtype=torch.float32)
    attach(model, merged, task="ssf")
    for delta in deltas:
        name = delta.tasks[0].name
        assert all(torch.equal(merged.head(name)[n], delta.head(name)[n]) for n in delta.head(name))
        if merge in MASKED:
            attach(detach(model), merged, task=name)
        else:
            set_head(model, merged, name)
        plain = families.build("vit", dtype=torch.float32)
        plain.load_state_dict(dict(fold(base, merged, task=name)))
        assert relative(logits(plain, x), logits(model, x)) < 1e-5


@pytest.mark.parametrize("merge", each(MERGES))
def test_saving_is_deterministic_and_exact(merge, tmp_path):
    """A lazy merge saved twice gives equal files, and opened it has the bits, the spec and the lineage."""
    base, deltas = base_of("vit"), [real("lora", "vit"), real("bitfit", "vit")]
    merged = joined(deltas, merge, base=base, coef=(1, 0.5), layers="blocks.0:0.5", parents=("a", "b"))
    digest = merged.save(tmp_path / "a.safetensors")
    assert digest == merged.save(tmp_path / "b.safetensors")
    opened = Delta.open(tmp_path / "a.safetensors")
    assert same(opened, merged)
    assert opened.method == merged.method
    assert [p.partition("[")[0] for p in opened.method.split("+") if p.startswith(merge)] == [merge]
    assert opened.lineage["parents"] == ["a", "b"]
    assert opened.lineage["coef"] == [1.0, 0.5]
    assert opened.lineage["layers"] == "blocks.0:0.5"


@pytest.mark.parametrize("merge", MASKED)
def test_a_merge_with_masks_is_of_one_task_at_a_time(merge):
    """Its network without a task, another head on a live one, and a merge of it are refused: each task has its own."""
    base, deltas = base_of("vit"), [real(s, "vit") for s in ("ssf", "lora")]
    merged, model = joined(deltas, merge, base=base), families.build("vit", dtype=torch.float32)
    with pytest.raises(UsageError, match="a network of its own for each task"):
        fold(base, merged, task="")
    attach(model, merged, task="ssf")
    with pytest.raises(UsageError, match="not only a head"):
        set_head(model, merged, "lora")
    with pytest.raises(NotFoldable, match="no one task vector"):
        joined([merged, real("bitfit", "vit")], "linear", base=base)
    with pytest.raises(UsageError, match="keeps a mask for each task"):
        joined([joined(deltas, "linear", base=base), real("bitfit", "vit")], merge, base=base)


@pytest.mark.parametrize("merge", each([m for m in MERGES if m not in MASKED]))
def test_a_merge_can_be_merged_again(merge):
    """A merge is a delta like others: with another one it merges on, and all heads are there."""
    base = base_of("vit")
    first = joined([real("lora", "vit"), real("ssf", "vit")], merge, base=base)
    second = joined([first, real("bitfit", "vit")], merge, base=base)
    assert [t.name for t in second.tasks] == ["lora", "ssf", "bitfit"]


@pytest.mark.parametrize("merge", each(MERGES))
def test_layers_scale_the_merged_task_vector(merge):
    """A factor on some layers scales what the merge changes there, and nothing else."""
    base, deltas = random_deltas(2, {f"blocks.{i}.weight": (4, 3) for i in range(3)})
    task = "t0" if merge in MASKED else ""
    plainly = fold(base, joined(deltas, merge, base=base), task=task)
    scaled = fold(base, joined(deltas, merge, base=base, layers="blocks.1-2:0.5,blocks.2:0"), task=task)
    for i, factor in enumerate((1.0, 0.5, 0.0)):
        name = f"blocks.{i}.weight"
        wanted = base[name] + factor * (plainly[name] - base[name])
        assert torch.allclose(scaled[name], wanted, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("merge", each(MERGES))
def test_half_precision_is_merged_in_float32(merge):
    """A float16 base and bfloat16 deltas merge as their float32 copies do, into float32."""
    base, deltas = random_deltas(2, {"a.weight": (9, 7)})
    low = {n: v.half() for n, v in base.items()}
    halves = [d.with_(tensors={n: v.bfloat16() for n, v in d.tensors.items()}) for d in deltas]
    wide = [d.with_(tensors={n: v.float() for n, v in d.tensors.items()}) for d in halves]
    got = joined(halves, merge, base=low, check=False).tensors["a.full.weight"]
    wanted = joined(wide, merge, base={n: v.float() for n, v in low.items()}, check=False).tensors["a.full.weight"]
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("low", [0, 1])
def test_resized_tensors_of_half_precision(low):
    """A delta stored in bfloat16 brings its rounded position table; the float32 one is kept, whichever comes first, and another is refused."""
    base, deltas = random_deltas(2, {"a.weight": (9, 7)})
    table = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0))
    base = {**base, "pos_embed": torch.zeros(1, 9, 3)}
    own = [d.with_(tensors={**d.tensors, f"{BASE}pos_embed": table}) for d in deltas]
    own[low] = own[low].with_(tensors={n: v.bfloat16() for n, v in own[low].tensors.items()})
    merged = vtzoo.merge(own, "linear", base=base, check=False)
    assert torch.equal(merged.tensors[f"{BASE}pos_embed"], table)
    for other in (low, 1 - low):
        moved = list(own)
        places = {f"{BASE}pos_embed": own[other].tensors[f"{BASE}pos_embed"] + 0.1}
        moved[other] = own[other].with_(tensors={**own[other].tensors, **places})
        with pytest.raises(ShapeMismatch, match="different resized tensors"):
            vtzoo.merge(moved, "linear", base=base, check=False)


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


@pytest.mark.parametrize(
    "merge",
    each([m for m in MERGES if m not in SPECTRAL]) + [pytest.param(m, marks=pytest.mark.slow) for m in SPECTRAL],
)
def test_memory_does_not_grow_with_tasks(merge, tmp_path):
    """Saving a merge of eight deltas has no higher peak than of three, but for masks, a bit an entry and task: 16 times the largest tensor (of 320 KiB) at most.

    40 times where it computes in float64.
    """
    shapes, peaks = {f"blocks.{i}.weight": (320, 256) for i in range(6)}, []
    for count in (2, 2) if merge == "slerp" else (3, 8):
        base, deltas = random_deltas(count, shapes)
        unkept = [d.with_(tensors=copies(d.tensors)) for d in deltas]
        merged = joined(unkept, merge, base=copies(base))
        with Peak() as peak:
            merged.save(tmp_path / f"{count}.safetensors")
        peaks.append(peak.high / (320 * 256 * 4))
    assert peaks[0] == pytest.approx(peaks[1], abs=0.1 + (5 / 32 if merge in MASKED else 0))
    assert peaks[1] < (40 if merge in WIDE else 16)


@pytest.mark.parametrize("merge", each(MERGES))
def test_every_merge_says_what_it_is(merge):
    """A merge's file has a paper, says whether it is symmetric and what is neutral, and its knobs have defaults."""
    card, module = registry.card("merges", merge), registry.load("merges", merge)
    assert card.paper.startswith(("arXiv:", "doi:"))
    assert f"Symmetric: {'yes' if module.SYMMETRIC else 'no'}" in card.doc
    assert "Neutral:" in card.doc
    assert all(k.default for k in card.knobs)
