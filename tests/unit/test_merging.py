"""Merges against independent rewrites in a few lines, and the parts of the engine."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import vtzoo
from tests.contract.merge_cases import base_of, random_deltas, real
from vtzoo.delta import Delta
from vtzoo.errors import Conflict, NotFound, Resources, UsageError
from vtzoo.folding import fold
from vtzoo.merges._floor import floors
from vtzoo.merges._layers import factors_of
from vtzoo.merges._whole import Whole
from vtzoo.tensors import write
from vtzoo.verbs.merge import merge_refs
from vtzoo.zoo import Zoo

SHAPES = {"a.weight": (37, 11), "a.bias": (37,), "b.weight": (5, 3, 2, 2), "b.bias": (5,)}
NAMES = sorted(SHAPES)


def flat(base, deltas):
    """Task vectors as one row each, in float64: what the authors' codes work on."""
    rows = [[(fold(base, d, task="")[n].double() - base[n].double()).reshape(-1) for n in NAMES] for d in deltas]
    return torch.stack([torch.cat(r) for r in rows]).numpy()


def merged_row(base, delta):
    """A merge's task vector as one row."""
    folded = fold(base, delta, task="")
    return np.concatenate([(folded[n].double() - base[n].double()).reshape(-1).numpy() for n in NAMES])


def trim(rows, density):
    """Keep the largest share of each row by magnitude (the authors' `topk_values_mask`)."""
    kept = np.zeros_like(rows)
    for row, out in zip(rows, kept, strict=True):
        count = max(1, round(density * row.size))
        top = np.argsort(-np.abs(row), kind="stable")[:count]
        out[top] = row[top]
    return kept


def ties_row(rows, density, weights):
    """TIES in a few lines: trim, elect, disjoint mean (Yadav et al., `ties_merging`, merge_func="dis-mean")."""
    rows, weights = trim(rows, density) * np.sign(weights)[:, None], np.abs(weights)[:, None]
    elected = np.sign((rows * weights).sum(0))
    agree = (np.sign(rows) == elected) & (rows != 0)
    return (rows * weights * agree).sum(0) / np.maximum((weights * agree).sum(0), 1e-300)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.5, 0.2), (1.0, -0.5, 2.0)])
def test_ties_is_the_authors(density, weights):
    """TIES over the whole vector equals the authors' algorithm on flattened vectors, in float64."""
    base, deltas = random_deltas(3, SHAPES)
    got = merged_row(base, vtzoo.merge(deltas, f"ties[density={density},scale=0.7]", base=base, coef=weights))
    wanted = 0.7 * ties_row(flat(base, deltas), density, np.array(weights))
    assert np.abs(got - wanted).max() < 1e-6
    assert (got != 0).mean() > density / 2


def test_ties_by_tensor_trims_each_tensor_alone():
    """With scope=tensor the share is kept in every tensor, so that none is emptied by the larger values of another."""
    base, deltas = random_deltas(3, SHAPES)
    for delta in deltas:
        delta.tensors["b.full.bias"].sub_(base["b.bias"]).mul_(1e-3).add_(base["b.bias"])
    merges = {s: vtzoo.merge(deltas, f"ties[density=0.2,scope={s}]", base=base) for s in ("vector", "tensor")}
    touched = {s: fold(base, m, task="")["b.bias"].ne(base["b.bias"]).any() for s, m in merges.items()}
    assert not touched["vector"]
    assert touched["tensor"]
    vectors = [fold(base, d, task="")["a.weight"] - base["a.weight"] for d in deltas]
    wanted = ties_row(torch.stack([v.double().reshape(-1) for v in vectors]).numpy(), 0.2, np.ones(3))
    got = fold(base, merges["tensor"], task="")["a.weight"] - base["a.weight"]
    assert np.abs(got.reshape(-1).double().numpy() - wanted).max() < 1e-6


def test_ties_elects_nobody_where_the_sum_is_zero():
    """Two task vectors that cancel exactly leave the backbone as it is."""
    base, (a, b) = random_deltas(2, {"a.weight": (2, 2)})
    base = {"a.weight": torch.zeros(2, 2)}
    a.tensors["a.full.weight"].copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    b.tensors["a.full.weight"].copy_(-a.tensors["a.full.weight"])
    merged = vtzoo.merge([a, b], "ties[density=1]", base=base, check=False)
    assert torch.equal(merged.tensors["a.full.weight"], base["a.weight"])


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.5, 3.0), (1.0, -0.5, 0.0)])
def test_linear_is_the_weighted_mean(weights):
    """Linear equals sum(w D) / sum(w), in float64."""
    base, deltas = random_deltas(3, SHAPES)
    got = merged_row(base, vtzoo.merge(deltas, "linear", base=base, coef=weights))
    wanted = np.average(flat(base, deltas), axis=0, weights=weights)
    assert np.abs(got - wanted).max() < 1e-6


def test_linear_refuses_weights_without_a_mean():
    """Weights that add up to zero have no mean; task arithmetic takes them."""
    base, deltas = random_deltas(2, SHAPES)
    with pytest.raises(UsageError, match="add up to 0"):
        vtzoo.merge(deltas, "linear", base=base, coef=(1, -1))
    vtzoo.merge(deltas, "task-arithmetic", base=base, coef=(1, -1))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, -0.5, 3.0)])
def test_task_arithmetic_is_the_scaled_sum(weights):
    """Task arithmetic equals scale * sum(w D), in float64; 0.3 is the default."""
    base, deltas = random_deltas(3, SHAPES)
    got = merged_row(base, vtzoo.merge(deltas, "task-arithmetic", base=base, coef=weights))
    assert np.abs(got - 0.3 * (flat(base, deltas) * np.array(weights)[:, None]).sum(0)).max() < 1e-6


def test_the_floor_is_found_without_sorting():
    """The selection over several tensors gives the value that a sort gives, at every density, with ties and zeros."""
    draw = torch.Generator().manual_seed(0)
    pieces = [torch.randn(1000, generator=draw), torch.randn(30, 7, generator=draw).round(decimals=1), torch.zeros(50)]
    magnitudes = torch.cat([p.reshape(-1) for p in pieces]).abs()
    ordered = magnitudes[magnitudes > 0].sort(descending=True).values
    for density in (1e-6, 0.01, 0.2, 0.5, 0.999):
        count = max(1, round(density * len(ordered)))
        assert floors(lambda: ((0, p.clone) for p in pieces), 1, density) == [float(ordered[count - 1])]
    assert floors(lambda: ((0, p.clone) for p in pieces), 1, 1.0) == [0.0]
    assert floors(lambda: [(0, torch.zeros(3).clone), (1, torch.ones(3).clone)], 2, 0.5) == [0.0, 1.0]


def test_the_floor_is_found_once():
    """A whole vector is read twice for its floor and never again for the same density."""
    reads: list[str] = []

    class Source(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name).clone()

    source = Source(a=torch.arange(10.0), b=torch.arange(5.0))
    whole = Whole([source], [1.0], {"a": (10,), "b": (5,)})
    assert whole.floor(0, 0.5) == whole.floor(0, 0.5) == 4.0
    assert sorted(reads) == ["a", "a", "b", "b"]


def test_floors_are_found_together():
    """Several task vectors are read in one pass, each with a floor of its own; one of weight 0 isn't read with the others."""
    reads: list[int] = []

    class Source(dict):
        def __getitem__(self, name):
            reads.append(int(super().__getitem__(name)[0]) // 100)
            return super().__getitem__(name).clone()

    sources = [Source(a=100.0 * i + torch.arange(10.0)) for i in range(7)]
    whole = Whole(sources, [1, 1, 0, 1, 1, 1, 1], {"a": (10,)})
    assert [whole.floor(i, 0.25) for i in (0, 1, 3, 4, 5, 6)] == [100.0 * i + 8 for i in (0, 1, 3, 4, 5, 6)]
    assert sorted(reads) == [0, 0, 1, 1, 3, 3, 4, 4, 5, 5, 6, 6]
    assert whole.floor(2, 0.25) == 208


def test_the_report_compares_task_vectors():
    """Norms are L2, and the agreement of signs counts the entries that both task vectors move."""
    a, b, c = torch.tensor([1.0, -2.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 5.0, 0.5]), torch.zeros(4)
    whole = Whole([{"x": a.clone()}, {"x": b.clone(), "y": b.clone()}, {"y": c}], [1, 1, 1], {"x": (4,), "y": (4,)})
    norms, shares = whole.norms(), whole.agreement()
    assert norms == pytest.approx([3.0, (2 * (1 + 4 + 25 + 0.25)) ** 0.5, 0.0])
    assert shares == {(0, 1): pytest.approx(2 / 3), (0, 2): None, (1, 2): None}


def test_the_lineage_says_how_it_was_made():
    """A merge's lineage has the verb, the spec, the weights and the parents, so that it can be repeated."""
    merged = vtzoo.merge([real("lora", "vit")], "ties[density=0.5]", base=base_of("vit"), coef=[0.5], parents=["abc"])
    assert merged.method == "ties[density=0.5]"
    found = {k: merged.lineage[k] for k in ("verb", "parents", "spec", "coef", "layers")}
    assert found == {"verb": "merge", "parents": ["abc"], "spec": "ties[density=0.5]", "coef": [0.5], "layers": ""}
    assert [p.method for p in merged.parts] == ["full"]


def test_layer_patterns():
    """Patterns stand for beginnings of names, ranges for numbers, `*` for anything, and the last match decides."""
    names = [f"blocks.{i}.{m}.weight" for i in (0, 1, 10) for m in ("norm1", "attn.qkv")] + ["norm.weight", "pos_embed"]
    assert factors_of(None, names) == factors_of("", names) == {}
    assert set(factors_of("blocks.1:0.5", names)) == {"blocks.1.norm1.weight", "blocks.1.attn.qkv.weight"}
    assert len(factors_of("blocks.0-9:0.5", names)) == 4
    assert len(factors_of("blocks.*.norm1:2", names)) == 3
    assert set(factors_of("*norm*:2", names)) == {n for n in names if "norm" in n}
    assert factors_of("blocks:0.5, blocks.10:-1", names)["blocks.10.norm1.weight"] == -1
    assert factors_of("pos_embed:1e-1", names) == {"pos_embed": 0.1}
    with pytest.raises(UsageError) as caught:
        factors_of("block.0:1", names)
    assert "blocks.0" in caught.value.hint


# ---------------------------------------------------------------------------------------------------------------- verb
@pytest.fixture
def zoo(tmp_path):
    """A zoo with a tiny backbone's weights and three deltas of it; one more lies in a file outside."""
    zoo = Zoo.init(tmp_path / "zoo")
    write(tmp_path / "base.safetensors", base_of("vit"), {})
    source = f"object:sha256:{zoo.add_object(tmp_path / 'base.safetensors')}"
    for spec in ("lora", "ssf", "bitfit", "norm"):
        delta = real(spec, "vit")
        path = tmp_path / f"{spec}.safetensors"
        delta.with_(backbone=replace(delta.backbone, name="tiny", source=source)).save(path)
        if spec != "norm":
            zoo.put("deltas", f"{spec}/a", {"digest": zoo.add_object(path)})
    return zoo


def everything(zoo):
    """Every file of a zoo with its bytes, its lock left out."""
    return {p: p.read_bytes() for p in zoo.root.rglob("*") if p.is_file() and p.name != "lock"}


def test_refs_merge_into_an_entry(zoo, tmp_path):
    """Names, unique prefixes and paths merge into an entry whose file is what `vtzoo.merge` gives, with a report."""
    refs = ["lora/a", "ssf", str(tmp_path / "norm.safetensors")]
    result = merge_refs(refs=refs, method="ties[density=0.5]", name="all", coef=(1, 0.5, 1), zoo=zoo, explain=True)
    entry, opened = zoo.resolve("all", "deltas"), Delta.open(result.path)
    assert (result.ref, entry.facts["tasks"], entry.facts["method"]) == (
        "all",
        ["lora", "ssf", "norm"],
        "ties[density=0.5]",
    )
    assert entry.facts["size_bytes"] == len(zoo.object(entry.digest).read_bytes())
    assert opened.lineage["parents"][0] == f"sha256:{zoo.resolve('lora/a').digest}"
    wanted = vtzoo.merge(
        [real(s, "vit") for s in ("lora", "ssf", "norm")], "ties[density=0.5]", base=base_of("vit"), coef=(1, 0.5, 1)
    )
    assert all(torch.equal(opened.tensors[n], wanted.tensors[n]) for n in wanted.tensors)
    parents, pairs = result.report["parents"], result.report["sign_agreement"]
    assert [p["coef"] for p in parents] == [1.0, 0.5, 1.0]
    assert all(p["norm"] > 0 for p in parents)
    assert result.report["merged_norm"] > 0
    assert [(p["a"], p["b"]) for p in pairs] == [(refs[0], refs[1]), (refs[0], refs[2]), (refs[1], refs[2])]
    assert all(p["share"] is None or 0 <= p["share"] <= 1 for p in pairs)
    assert result.report["tensors"] == len(opened.tensors) - 6
    place = zoo.object(entry.digest)
    assert place.stat().st_mode & 0o222 == 0
    assert not list(place.parents[4].glob("merge-*"))


def test_a_dry_run_merges_nothing(zoo, tmp_path):
    """The plan has the parents and the size that the file would have; nothing is written and no tensor of a delta is read."""
    before = {p: p.stat().st_mtime_ns for p in zoo.root.rglob("*")}
    found = merge_refs(refs=["lora/a", "ssf"], method="dare+ties", name="both", zoo=zoo, dry_run=True)
    assert {p: p.stat().st_mtime_ns for p in zoo.root.rglob("*")} == before
    assert (found.path, found.report["spec"]) == ("", "dare+ties")
    made = merge_refs(refs=["lora/a", "ssf"], method="dare+ties", name="both", zoo=zoo)
    assert {k: v for k, v in made.report.items() if k in found.report and k != "parents"} == {
        k: v for k, v in found.report.items() if k in made.report and k != "parents"
    }
    size = Path(made.path).stat().st_size
    assert size * 0.5 < found.report["size_bytes"] < size


def test_a_disk_that_is_too_small_is_told_before(zoo, monkeypatch):
    """The merge is refused before a byte is written, with both sizes."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(Resources, match=r"takes 0 MB|takes \d+ MB"):
        merge_refs(refs=["lora/a", "ssf"], method="linear", name="both", zoo=zoo)
    assert not list(zoo.root.glob(".vtzoo/merge-*"))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"name": "lora/a"}, Conflict),
        ({"name": "Bad Name"}, UsageError),
        ({"refs": ["lora/a", "sff/a"]}, NotFound),
        ({"refs": ["lora/a", "lora"]}, UsageError),
        ({"refs": []}, UsageError),
        ({"refs": ["lora/a", "./nowhere.safetensors"]}, NotFound),
        ({"method": "tise"}, NotFound),
        ({"method": "ties[density=x]"}, UsageError),
        ({"coef": (1.0,)}, UsageError),
        ({"layers": "stages.0:1"}, UsageError),
    ],
)
def test_a_refused_merge_leaves_the_zoo_as_it_was(zoo, change, error):
    """A taken name, an unknown or doubled ref, or a wrong spec is refused with a hint, and no file is new."""
    before = everything(zoo)
    with pytest.raises(error) as caught:
        merge_refs(**{"refs": ["lora/a", "ssf/a"], "method": "linear", "name": "all", "zoo": zoo, **change})
    assert caught.value.hint
    assert everything(zoo) == before


def test_a_full_disk_leaves_the_zoo_as_it_was(zoo, monkeypatch):
    """When the disk is full in the middle of writing, the merge ends with Resources and nothing half-written stays."""
    before, calls = everything(zoo), []

    def full(*args):
        calls.append(args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Resources):
        merge_refs(refs=["lora/a", "ssf/a"], method="linear", name="all", zoo=zoo)
    assert calls
    assert everything(zoo) == before
    assert not [p for p in (zoo.root / ".vtzoo").iterdir() if p.name.startswith("merge-")]
