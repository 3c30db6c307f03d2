"""The papers' formulas of the merges, written out anew in numpy and float64, on tensors that aren't square.

What merges is in float32, so differences are relative to the largest entry and a few units of its last place.
"""

import math
import re

import numpy as np
import pytest
import torch

import vtzoo
from tests.contract.merge_cases import random_deltas
from vtzoo import registry
from vtzoo.errors import Corrupt, UsageError
from vtzoo.folding import fold
from vtzoo.merges import _spectral
from vtzoo.merges._chain import algorithm, checks, steps
from vtzoo.merges._draw import uniform
from vtzoo.merges._whole import Whole
from vtzoo.merges.surgery import surgery

SHAPES = {
    "stem.weight": (6, 3, 2, 2), "blocks.0.a.weight": (13, 7), "blocks.1.a.weight": (7, 13), "blocks.2.a.bias": (13,),
    "blocks.2.d.weight": (8, 1, 3, 3), "norm.weight": (7,),
}  # fmt: skip
MATRICES = {"stem.weight", "blocks.0.a.weight", "blocks.1.a.weight"}
DEPTH = {"stem.weight": 0.0, "blocks.0.a.weight": 0.0, "blocks.1.a.weight": 0.5, "blocks.2.a.bias": 1.0}
DEPTH |= {"blocks.2.d.weight": 1.0, "norm.weight": 1.0}
COEF = (1.0, 0.5, 2.0)
TOLERANCE = 2e-6
PLACES = {"a.weight": "a.full.weight", "b.bias": "b.full.bias"}
LOW_RANK = [
    name
    for name in registry.names("merges")
    if getattr(module := registry.load("merges", name), "STAGE", "merge") in ("merge", "space")
    and not hasattr(module, "mask")
]


class Fresh(dict):
    """Gives a new tensor at each access, as task vectors do."""

    def __getitem__(self, name):
        return super().__getitem__(name).clone()


def tasks(count=3, rank=0, shapes=SHAPES):
    """Random task vectors in float32; of low rank where asked."""
    draw, found = torch.Generator().manual_seed(count), []
    for _ in range(count):
        own = {n: 0.1 * torch.randn(s, generator=draw) for n, s in shapes.items()}
        for name in MATRICES & set(own) if rank else ():
            rows = own[name].flatten(1)
            low = torch.randn(rows.shape[0], rank, generator=draw) @ torch.randn(rank, rows.shape[1], generator=draw)
            own[name] = low.reshape(own[name].shape)
        found.append(Fresh(own))
    return found


def compare(agree, spec, rewrite, *, sources=None, coef=COEF, **facts):
    """Each tensor of a merge beside `rewrite(name, [w_t D_t in float64])`."""
    sources = sources or tasks(len(coef))
    merged = algorithm(steps(spec), Whole(sources, coef, SHAPES, **facts))
    worst = 0.0
    for name in SHAPES:
        rows = [w * s[name].double().numpy() for w, s in zip(coef, sources, strict=True)]
        wanted, got = rewrite(name, rows), merged(name).double().numpy()
        assert np.abs(wanted).max() > 1e-4 or spec.startswith(("breadcrumbs", "consensus", "della"))
        worst = max(worst, float(np.abs(wanted - got).max() / max(np.abs(wanted).max(), 1e-12)))
    agree(spec, "rewrite", TOLERANCE, merged=worst)


def svd(matrix, most=None):
    """Thin SVD, of the directions that are no rounding."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    rank = int((s > 1e-5 * s[0]).sum()) if most is None else min(int((s > 1e-5 * s[0]).sum()), most)
    return u[:, :rank], s[:rank], vt[:rank]


def flat(rows):
    """As matrices."""
    return [r.reshape(r.shape[0], -1) for r in rows]


def whitened(u):
    """(U U')^(-1/2) U by the eigenvectors of the smaller Gram matrix."""
    tall = u if u.shape[0] >= u.shape[1] else u.T
    values, vectors = np.linalg.eigh(tall.T @ tall)
    out = tall @ vectors @ np.diag(values**-0.5) @ vectors.T
    return out if u.shape[0] >= u.shape[1] else out.T


def spectral(rule):
    """A rule for matrices; the mean for the rest."""

    def rewrite(name, rows):
        if name not in MATRICES:
            return sum(rows) / len(rows)
        return rule(flat(rows)).reshape(rows[0].shape)

    return rewrite


def tsv(rows):
    """Gargiulo et al., algorithm 1."""
    keep = min(rows[0].shape) // len(rows)
    parts = [svd(r, keep) for r in rows]
    u, s, vt = (np.concatenate([p[i] for p in parts], axis=a) for i, a in ((0, 1), (1, 0), (2, 0)))
    return whitened(u) @ np.diag(s) @ whitened(vt)


def iso_c(rows):
    """Marczak et al., algorithm 1."""
    u, s, vt = svd(sum(rows))
    return s.mean() * u @ vt


def iso_cts(rows, common=0.8):
    """Marczak et al., algorithm 2."""
    u, s, vt = svd(sum(rows))
    own = min(round((1 - common) * len(s) / len(rows)), (len(s) - 1) // len(rows))
    k = len(s) - own * len(rows)
    us, ss, vs = [u[:, :k]], [s[:k]], [vt[:k]]
    for row in rows:
        a, z, bt = np.linalg.svd(row - u[:, :k] @ u[:, :k].T @ row, full_matrices=False)
        us, ss, vs = [*us, a[:, :own]], [*ss, z[:own]], [*vs, bt[:own]]
    return np.concatenate(ss).mean() * whitened(np.concatenate(us, 1)) @ whitened(np.concatenate(vs, 0))


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    ("spec", "rule"), [("tsv", tsv), ("iso-c", iso_c), ("iso-cts[common=0.5]", lambda r: iso_cts(r, 0.5))]
)
def test_spectral(spec, rule, rank, agree):
    """TSV-Merge, Iso-C and Iso-CTS, of full and of low rank."""
    compare(agree, spec, spectral(rule), sources=tasks(3, rank))


def wudi(rows, steps=20, lr=1e-3):
    """Cheng et al., eq. 7, by Adam on the loss as it is written."""
    d, m, v = sum(rows), 0.0, 0.0
    for i in range(1, steps + 1):
        slope = sum(2 * (d - r) @ r.T @ r / (r**2).sum() for r in rows)
        m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
        d = d - lr * (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.999**i)) + 1e-8)
    return d


@pytest.mark.parametrize("rank", [0, 1])
def test_wudi(rank, agree):
    """WUDI's descent from the sum, of full rank and of so low a one that it goes by thin factors."""
    compare(agree, "wudi[steps=20,lr=0.001]", spectral(wudi), sources=tasks(3, rank))


def test_wudi_lowers_its_loss():
    """The descent ends below where it starts."""
    rows = [t["blocks.0.a.weight"].double().numpy() for t in tasks()]

    def loss(d):
        return sum((((d - r) @ r.T) ** 2).sum() / (r**2).sum() for r in rows)

    assert loss(wudi(rows)) < 0.99 * loss(sum(rows))


def test_surgery(agree):
    """Yang et al., eq. 4 and 6: z - U relu(D z), fitted by Adam to the task's own features in L1."""
    draw = torch.Generator().manual_seed(1)
    seen, own = torch.randn(2, 11, 7, generator=draw)
    d = (2 * torch.rand(3, 7, generator=torch.Generator().manual_seed(0)).double().numpy() - 1) / math.sqrt(7)
    u, z, t = np.zeros((7, 3)), seen.double().numpy(), own.double().numpy()
    moments = [[0.0, 0.0], [0.0, 0.0]]
    for i in range(1, 41):
        hidden = np.maximum(z @ d.T, 0)
        slope = -np.sign(z - hidden @ u.T - t) / z.size
        for k, grad in enumerate((((slope @ u) * (hidden > 0)).T @ z, slope.T @ hidden)):
            m, v = moments[k] = [0.9 * moments[k][0] + 0.1 * grad, 0.999 * moments[k][1] + 0.001 * grad**2]
            step = 0.01 * (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.999**i)) + 1e-8)
            d, u = (d - step, u) if k == 0 else (d, u - step)
    down, up = surgery(seen, own, rank=3, steps=40, lr=0.01, batch=11)
    wanted, got = (z - np.maximum(z @ a.T, 0) @ b.T for a, b in ((d, u), (down.double().numpy(), up.double().numpy())))
    assert np.abs(wanted - z).max() > 0.1
    agree("surgery", "rewrite", 1e-5, features=float(np.abs(wanted - got).max() / np.abs(wanted).max()))


@pytest.mark.parametrize("least", [None, 1.0])
def test_svc(least, agree):
    """Li et al., eq. 8: each direction of the sum is divided by how often it counts the tasks."""

    def rewrite(name, rows):
        if name not in MATRICES:
            return 0.3 * sum(rows)
        rows = flat(rows)
        u, s, vt = svd(0.3 * sum(rows))
        for i in range(len(s)):
            counts = []
            for row in rows:
                a = u[:, i] @ row
                counts.append(max(least or 1 / len(rows), s[i] * vt[i] @ a / (a @ a)))
            s[i] *= len(rows) / sum(counts)
        return (u @ np.diag(s) @ vt).reshape(SHAPES[name])

    compare(agree, "svc" if least is None else "svc[least=1]", rewrite)


def ties(rows, density):
    """Trim, elect, disjoint mean, in one tensor."""
    kept = [np.where(np.abs(r) >= np.sort(np.abs(r), axis=None)[-max(1, round(density * r.size))], r, 0) for r in rows]
    elected = np.sign(sum(kept))
    agree = [(np.sign(k) == elected) & (k != 0) for k in kept]
    return sum(k * a for k, a in zip(kept, agree, strict=True)) / np.maximum(
        sum(a.astype(float) for a in agree), 1e-300
    )


def test_knots(agree):
    """Stoica et al., sec. 4: TIES on S V_t' of the SVD of the task vectors side by side."""

    def rewrite(name, rows):
        if name not in MATRICES:
            return ties(rows, 0.5)
        u, s, vt = svd(np.concatenate(flat(rows), axis=1))
        codes = np.split(np.diag(s) @ vt, len(rows), axis=1)
        return (u @ ties(codes, 0.5)).reshape(rows[0].shape)

    compare(agree, "knots+ties[density=0.5,scope=tensor]", rewrite, coef=(1.0, 1.0, 1.0))


@pytest.mark.parametrize("space", ["knots", "core"])
def test_spaces_change_no_sum(space, agree):
    """Task arithmetic is the same in any space: nothing is lost on the way there and back."""
    for rank in (0, 2):
        compare(agree, f"{space}+task-arithmetic[scale=0.7]", lambda _, rows: 0.7 * sum(rows), sources=tasks(3, rank))


def test_core(agree):
    """Panariello et al., sec. 4: TIES on U' D_t V, with the bases of the stacked factors."""

    def rewrite(name, rows):
        if name not in MATRICES:
            return ties(rows, 0.5)
        rows = flat(rows)
        parts = [svd(r) for r in rows]
        u = svd(np.concatenate([p * np.sqrt(s) for p, s, _ in parts], axis=1))[0]
        v = svd(np.concatenate([(q.T * np.sqrt(s)).T for _, s, q in parts], axis=0))[2].T
        assert u.shape[1] <= 6
        return (u @ ties([u.T @ r @ v for r in rows], 0.5) @ v.T).reshape(SHAPES[name])

    compare(agree, "core+ties[density=0.5,scope=tensor]", rewrite, sources=tasks(3, 2), coef=(1.0, 1.0, 1.0))


def test_dare(agree):
    """Yu et al.: the mask, and the rest grown by 1 / density."""

    def rewrite(name, _):
        rows = []
        for i, (w, t) in enumerate(zip(COEF, tasks(), strict=True)):
            mask = (uniform(7, f"k{i}/{name}#0", SHAPES[name]) < 0.6).numpy()
            rows.append(w * mask * t[name].double().numpy() / 0.6)
        return 0.3 * sum(rows)

    compare(agree, "dare[density=0.6,seed=7]", rewrite, keys=("k0", "k1", "k2"))


@pytest.mark.parametrize("spec", ["dare[density={}]", "della[density={},window=0.2]"])
def test_random_drops_keep_the_mean(spec):
    """Over many entries the share kept is the density, and the expectation of an entry is the entry."""
    value = {"w": (400, 500)}
    for density in (0.1, 0.5, 0.9):
        chain = steps(f"{spec.format(density)}+task-arithmetic[scale=1]")
        out = algorithm(chain, Whole([Fresh(w=torch.ones(400, 500))], (1.0,), value))("w")
        assert abs(float((out != 0).float().mean()) - density) < 0.005
        assert abs(float(out.mean()) - 1) < 0.02


def test_draws_are_their_keys_own():
    """Seeds, tasks and tensors have numbers of their own, in [0, 1), and uniform ones."""
    first = uniform(0, "a/x", (1000, 50))
    assert torch.equal(first, uniform(0, "a/x", (1000, 50)))
    for seed, key in ((1, "a/x"), (0, "b/x"), (0, "a/y")):
        assert abs(float(torch.corrcoef(torch.stack([first, uniform(seed, key, (1000, 50))]).flatten(1))[0, 1])) < 0.02
    assert 0 <= float(first.min()) < 1e-3
    assert 0.999 < float(first.max()) < 1
    assert abs(float(first.mean()) - 0.5) < 0.005


def test_della(agree):
    """Deep et al.: keep probabilities rise with the rank within a row, and what is kept is divided by its own."""

    def rewrite(name, _):
        rows = []
        for i, (w, t) in enumerate(zip(COEF, tasks(), strict=True)):
            value = t[name].double().numpy()
            table = value.reshape(value.shape[0], -1) if value.ndim > 1 else value.reshape(1, -1)
            chance = np.empty_like(table)
            for row, out in zip(table, chance, strict=True):
                out[np.argsort(np.abs(row))] = np.linspace(0.4, 0.8, len(row))
            mask = uniform(0, f"{i}/{name}#0", table.shape).double().numpy() < chance
            rows.append(w * (mask * table / chance).reshape(value.shape))
        return sum(rows)

    compare(agree, "della[density=0.6,window=0.4]+task-arithmetic[scale=1]", rewrite)


def test_breadcrumbs(agree):
    """Davari & Belilovsky: both ends of each tensor are left out."""

    def rewrite(_, rows):
        found = []
        for row in rows:
            size = np.sort(np.abs(row), axis=None)[::-1]
            top, low = max(1, round(0.1 * size.size)), max(1, round(0.6 * size.size))
            found.append(np.where((np.abs(row) < size[top - 1]) & (np.abs(row) >= size[low - 1]), row, 0))
        return sum(found)

    compare(agree, "breadcrumbs[density=0.5,outliers=0.1]+task-arithmetic[scale=1]", rewrite)


def test_sce(agree):
    """Wan et al., sec. 3.3: select by variance, weigh by energy, erase the minority."""

    def rewrite(_, rows):
        table = np.stack(rows)
        variance = table.var(0)
        chosen = variance >= np.sort(variance, axis=None)[-max(1, round(0.4 * variance.size))]
        energy = ((table * chosen) ** 2).reshape(len(rows), -1).sum(1)
        agree_ = (np.sign(table) == np.sign(table.sum(0))) * chosen
        shares = energy.reshape(-1, *[1] * rows[0].ndim) / energy.sum() * agree_
        return (table * shares).sum(0) / np.maximum(shares.sum(0), 1e-300)

    compare(agree, "sce[density=0.4]", rewrite)


def test_model_stock(agree):
    """Jang et al., eq. 7, with task vectors that have something in common."""
    sources = tasks()
    for source in sources[1:]:
        for name in SHAPES:
            dict.__setitem__(source, name, source[name] + sources[0][name])

    def rewrite(_, rows):
        pairs = [(a.ravel(), b.ravel()) for i, a in enumerate(rows) for b in rows[:i]]
        c = max(np.mean([a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in pairs]), 0)
        return len(rows) * c / (1 + (len(rows) - 1) * c) * sum(rows) / len(rows)

    compare(agree, "model-stock", rewrite, sources=sources)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(t, agree):
    """Shoemake's formula on the networks' weights."""
    ground = Fresh({n: torch.randn(s, generator=torch.Generator().manual_seed(5)) for n, s in SHAPES.items()})
    sources = [Fresh({n: 10 * v for n, v in s.items()}) for s in tasks(2)]

    def rewrite(name, rows):
        base = ground[name].double().numpy()
        a, b = (base + r for r in rows)
        angle = np.arccos((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
        return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle) - base

    compare(agree, f"slerp[t={t}]", rewrite, sources=sources, coef=(1.0, 1.0), ground=ground)


def test_slerp_goes_straight_between_neighbours(agree):
    """Where the two point the same way it is the line between them."""
    ground = Fresh({n: 1 + torch.rand(s, generator=torch.Generator().manual_seed(5)) for n, s in SHAPES.items()})
    sources = [Fresh({n: 1e-2 * v for n, v in s.items()}) for s in tasks(2)]
    got = algorithm(steps("slerp"), Whole(sources, (1.0, 1.0), SHAPES, ground=ground))("blocks.0.a.weight")
    wanted = (sources[0]["blocks.0.a.weight"] + sources[1]["blocks.0.a.weight"]) / 2
    agree("slerp", "straight line", 1e-3, merged=float((got - wanted).abs().max() / wanted.abs().max()))


def test_karcher_is_where_the_pulls_cancel():
    """At the mean the weighted logarithms add up to nothing, and its length is the weighted mean length."""
    coef, sources = (1.0, 2.0, 1.0), tasks()
    merged = algorithm(steps("karcher[rounds=50,tolerance=1e-7]"), Whole(sources, coef, SHAPES))
    for name in SHAPES:
        rows = [s[name].double().numpy().ravel() for s in sources]
        got = merged(name).double().numpy().ravel()
        u, lengths = got / np.linalg.norm(got), [np.linalg.norm(r) for r in rows]
        assert np.linalg.norm(got) == pytest.approx(np.average(lengths, weights=coef), rel=1e-5)
        pull = 0.0
        for w, row, length in zip(coef, rows, lengths, strict=True):
            v = row / length
            angle = np.arccos(np.clip(u @ v, -1, 1))
            pull = pull + w / sum(coef) * angle * (v - np.cos(angle) * u) / np.sin(angle)
        assert np.linalg.norm(pull) < 1e-5


def test_karcher_in_one_round(agree):
    """mergekit's multislerp: one step from the weighted mean direction."""

    def rewrite(_, rows):
        shares = np.array(COEF) / sum(COEF)
        plain = [r / w for r, w in zip(rows, COEF, strict=True)]
        lengths = [np.linalg.norm(r) for r in plain]
        units = [r / n for r, n in zip(plain, lengths, strict=True)]
        at = sum(p * u for p, u in zip(shares, units, strict=True))
        at /= np.linalg.norm(at)
        step = 0.0
        for p, u in zip(shares, units, strict=True):
            angle = np.arccos((at * u).sum())
            step = step + p * angle * (u - np.cos(angle) * at) / np.sin(angle)
        size = np.linalg.norm(step)
        return (np.cos(size) * at + np.sin(size) * step / size) * (shares @ lengths)

    compare(agree, "karcher[rounds=1]", rewrite)


def test_karcher_refuses_negative_weights():
    """A negative weight turns a direction round: there is no middle."""
    with pytest.raises(UsageError, match="no middle"):
        checks(steps("karcher"), (1.0, -1.0))


def test_consensus(agree):
    """Wang et al., eq. 4 and 5: what two tasks use of the sum."""

    def rewrite(_, rows):
        total = sum(rows)
        users = sum((np.abs(r) >= 0.6 * np.abs(total - r)).astype(int) for r in rows)
        return 0.3 * total * (users >= 2)

    compare(agree, "consensus[threshold=0.6]", rewrite)


def test_lines(agree):
    """Wang et al., eq. 4: a factor that rises with depth."""
    compare(
        agree, "task-arithmetic[scale=1]+lines[first=0.2,last=0.9]",
        lambda name, rows: (0.2 + 0.7 * DEPTH[name]) * sum(rows),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("ties+dare", r"dare\+ties"),
        ("ties+linear", "2 merges"),
        ("svc+ties", r"ties\+svc"),
        ("slerp", "2 deltas, not 3"),
        ("emr+lines", "write emr alone"),
        ("dare+tall", "write tall alone"),
    ],
)
def test_chains_that_make_no_sense(spec, said):
    """Steps in the wrong place are refused with the spec to write."""
    with pytest.raises(UsageError) as caught:
        checks(steps(spec), (1.0, 1.0, 1.0))
    assert re.search(said, f"{caught.value} {caught.value.hint}")


@pytest.mark.parametrize("missing", [False, True])
def test_cart(missing, agree):
    """Choi et al.: low-rank parts of what is centred on the mean, through the eigenvectors of the Gram matrix."""
    sources = without(tasks(), "blocks.0.a.weight", 2) if missing else tasks()

    def rewrite(name):
        rows = [
            w * s[name].double().numpy() if name in s else np.zeros(SHAPES[name])
            for w, s in zip(COEF, sources, strict=True)
        ]
        mean = sum(rows) / 3
        if name not in MATRICES:
            return mean
        merged = flat([mean])[0].copy()
        for away in flat([r - mean for r in rows]):
            first = np.linalg.eigh(away @ away.T)[1][:, ::-1][:, : max(1, round(0.3 * min(away.shape)))]
            merged += 0.7 * first @ first.T @ away
        return merged.reshape(SHAPES[name])

    merged = algorithm(steps("cart[share=0.3,scale=0.7]"), Whole(sources, COEF, SHAPES))
    pairs = [(rewrite(n), merged(n).double().numpy()) for n in SHAPES]
    agree("cart", "rewrite", TOLERANCE, merged=max(np.abs(a - b).max() / np.abs(a).max() for a, b in pairs))


def test_svd(agree):
    """Eckart & Young: the sum, projected onto its first right singular vectors."""

    def rewrite(name, rows):
        if name not in MATRICES:
            return 0.3 * sum(rows)
        total = 0.3 * sum(flat(rows))
        first = np.linalg.eigh(total.T @ total)[1][:, ::-1][:, :2]
        return (total @ first @ first.T).reshape(SHAPES[name])

    compare(agree, "svd[rank=2]", rewrite)


def seen(kind, count=3):
    """Random evidence of each task, in float32; none for the norm."""
    draw, found = torch.Generator().manual_seed(7), []
    for _ in range(count):
        own = {n: torch.rand(s, generator=draw) for n, s in SHAPES.items() if n != "norm.weight"}
        if kind == "grams":
            rows = {n: torch.randn(60, math.prod(SHAPES[n][1:]), generator=draw) for n in MATRICES}
            own = {n: r.T @ r for n, r in rows.items()}
        found.append(own)
    return found


def without(sources, name, task):
    """The same task vectors, one of which leaves a tensor alone."""
    return [Fresh({n: t for n, t in s.items() if (i, n) != (task, name)}) for i, s in enumerate(sources)]


@pytest.mark.parametrize("touched", [True, False])
def test_regmean(agree, touched):
    """Each row by least squares over all tasks' inputs and outputs, where the Gram is no rewrite's: X from its Cholesky factor."""
    name, facts = "blocks.0.a.weight", seen("grams")
    sources = tasks() if touched else without(tasks(), name, 1)

    def inputs(task, name):
        gram = facts[task][name].double().numpy()
        shrunk = 0.9 * gram + 0.1 * np.diag(np.diag(gram)) + 1e-3 * np.diag(gram).mean() * np.eye(len(gram))
        return math.sqrt(COEF[task]) * np.linalg.cholesky(shrunk).T

    def rewrite(name, _):
        if name not in MATRICES:
            return sum(w * s[name].double().numpy() for w, s in zip(COEF, sources, strict=True)) / 3
        zero, xs, ys = torch.zeros(SHAPES[name]), [], []
        for task, source in enumerate(sources):
            matrix = source.get(name, zero).double().flatten(1).numpy()
            xs.append(inputs(task, name))
            ys.append(xs[-1] @ matrix.T)
        return np.linalg.lstsq(np.vstack(xs), np.vstack(ys), rcond=None)[0].T.reshape(SHAPES[name])

    merged = algorithm(steps("regmean[shrink=0.9,ridge=1e-3]"), Whole(sources, COEF, SHAPES, evidence=facts))
    pairs = [(rewrite(n, None), merged(n).double().numpy()) for n in SHAPES]
    agree("regmean", "least squares", TOLERANCE, merged=max(np.abs(a - b).max() / np.abs(a).max() for a, b in pairs))


@pytest.mark.parametrize("normalize", [True, False])
def test_fisher(agree, normalize):
    """Each entry's mean, weighted by its information; the plain mean where nothing is known."""
    facts, sources = seen("fisher"), without(tasks(), "blocks.1.a.weight", 0)

    def rewrite(name, _):
        values = [s[name].double().numpy() if name in s else np.zeros(SHAPES[name]) for s in sources]
        if name == "norm.weight":
            return sum(w * v for w, v in zip(COEF, values, strict=True)) / 3
        known = [f[name].double().numpy() for f in facts]
        shares = [w * f / (f.mean() if normalize else 1) for w, f in zip(COEF, known, strict=True)]
        return sum(f * v for f, v in zip(shares, values, strict=True)) / sum(shares)

    merged = algorithm(steps(f"fisher[normalize={normalize}]"), Whole(sources, COEF, SHAPES, evidence=facts))
    pairs = [(rewrite(n, None), merged(n).double().numpy()) for n in SHAPES]
    agree("fisher", "rewrite", TOLERANCE, merged=max(np.abs(a - b).max() / np.abs(a).max() for a, b in pairs))


def matching(agree, spec, rewrite, sources, facts=None, tolerance=TOLERANCE, shapes=None):
    """`rewrite(name)` beside each tensor of the merge, where it needs more than the weighted rows."""
    merged = algorithm(steps(spec), Whole(sources, COEF, shapes or SHAPES, evidence=facts or ()))
    pairs = [(rewrite(n), merged(n).double().numpy()) for n in shapes or SHAPES]
    agree(spec, "rewrite", tolerance, merged=max(np.abs(a - b).max() / max(np.abs(a).max(), 1e-12) for a, b in pairs))


def test_pcb(agree):
    """Du et al., eq. 1 to 5, over each task's whole vector: sizes cut at the largest 1e-4, scores, the best tenth, their mean."""
    sources = tasks()
    flats = [
        np.concatenate([w * s[n].double().numpy().ravel() for n in SHAPES]) for w, s in zip(COEF, sources, strict=True)
    ]
    cut = []
    for row in flats:
        most = np.sort(np.abs(row))[-max(1, round(1e-4 * row.size))]
        cut.append(np.clip(row, -most, most))
    says = []
    for row in cut:
        score = np.exp(3 * (np.abs(row) / np.abs(row).max()) ** 2) * np.tanh(row * sum(flats))
        last = np.sort(score)[-round(0.1 * row.size)]
        says.append(np.clip((score - last) / (score.max() - last), 0, None))
    total = sum(says)
    merged = np.where(
        total > 0, 1.2 * sum(c * s for c, s in zip(cut, says, strict=True)) / np.maximum(total, 1e-300), 0
    )
    places, start = {}, 0
    for name, shape in SHAPES.items():
        places[name] = merged[start : start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    matching(
        agree, "pcb[density=0.1]", lambda n: places[n], sources, tolerance=2e-5
    )  # small shares are differences of scores


@pytest.mark.parametrize("apart", [False, True])
def test_ace(apart, agree):
    """Xu et al., algorithm 1, with and without the part for tasks of different sizes."""

    def rule(rows):
        sizes = [(r**2).sum() for r in rows]
        centred = [r - r.mean(0) for r in rows]
        spreads = [c.T @ c / (np.trace(c.T @ c) if apart else 1) for c in centred]
        eye = 0.01 * np.trace(sum(spreads)) / len(rows) / len(spreads[0]) * np.eye(len(spreads[0]))
        common = sum(spreads).mean(0)[None] / (np.mean(sizes) if apart else 1)
        a = sum(s + eye for s in spreads) + np.ones((len(eye), 1)) @ common
        d = sum(r @ (s + eye) for r, s in zip(rows, spreads, strict=True)) @ np.linalg.inv(a)
        if not apart:
            return d
        u, z, vt = np.linalg.svd(
            d + sum(r @ (s - sum(spreads) / len(rows)) for r, s in zip(rows, spreads, strict=True)), full_matrices=False
        )
        k = max(1, int(0.3 * len(z)))
        return d + z[:k].mean() * u[:, :k] @ vt[:k]

    compare(agree, f"ace[uneven={0 if apart else 1e12}]", spectral(rule))


def test_esm(agree):
    """Li et al., sec. 4, with the inputs themselves: principal directions of their outputs' shifts, and three scalings."""
    sources, draw = tasks(), torch.Generator().manual_seed(9)
    inputs = [{n: torch.randn(60, math.prod(SHAPES[n][1:]), generator=draw) for n in MATRICES} for _ in range(3)]
    facts = [{n: x.T @ x for n, x in own.items()} for own in inputs]

    def joined(name):
        rows = flat([w * s[name].double().numpy() for w, s in zip(COEF, sources, strict=True)])
        most, us, vs = rows[0].shape[0] // 3, [], []
        for row, own in zip(rows, inputs, strict=True):
            u = np.linalg.svd((own[name].double().numpy() @ row.T).T)[0][:, :most]
            us.append(u)
            vs.append(u.T @ row * (np.linalg.norm(row) / np.mean([np.linalg.norm(r) for r in rows])) ** 2)
        u, v = np.concatenate(us, 1), np.concatenate(vs, 0)
        v = v * (np.linalg.norm(v, axis=0) / np.linalg.norm(v, axis=0).mean()) ** 2
        means = [np.linalg.svd(m, compute_uv=False).mean() for m in (u, v)]
        return means[0] * means[1] * whitened(u) @ whitened(v)

    def rewrite(name):
        if name not in MATRICES:
            return sum(w * s[name].double().numpy() for w, s in zip(COEF, sources, strict=True)) / 3
        kin = ["stem.weight"] if name == "stem.weight" else ["blocks.0.a.weight", "blocks.1.a.weight"]
        size = np.linalg.norm(joined(name)) / np.mean([np.linalg.norm(joined(n)) for n in kin])
        return 0.5 * (joined(name) * size**2).reshape(SHAPES[name])

    matching(agree, "esm[scale=0.5]", rewrite, sources, facts, tolerance=2e-5)


def test_emr(agree):
    """Huang et al., sec. 3.2: the elected vector, and each task's mask and scale."""

    def rewrite(_, rows):
        sign = np.sign(sum(rows))
        return sign * np.max([np.where(np.sign(r) == sign, np.abs(r), 0) for r in rows], axis=0)

    compare(agree, "emr", rewrite)
    base, deltas = random_deltas(3, {"a.weight": (9, 7), "b.bias": (11,)})
    merged = vtzoo.merge(deltas, "emr", base=base, coef=COEF)
    rows = [
        np.concatenate([w * (d.tensors[p] - base[n]).double().numpy().ravel() for n, p in PLACES.items()])
        for w, d in zip(COEF, deltas, strict=True)
    ]
    whole, worst = rewrite("", rows), 0.0
    for task, row in zip(deltas, rows, strict=True):
        mask = np.sign(row) == np.sign(whole)
        wanted = np.abs(row).sum() / np.abs(mask * whole).sum() * mask * whole
        got = fold(base, merged, task=task.tasks[0].name)
        own = np.concatenate([(got[n] - base[n]).double().numpy().ravel() for n in PLACES])
        worst = max(worst, float(np.abs(own - wanted).max() / np.abs(wanted).max()))
    agree("emr", "its tasks' networks", TOLERANCE, merged=worst)


def test_tall(agree):
    """Wang et al., eq. 4: of the sum each task keeps what is its own."""
    base, deltas = random_deltas(3, {"a.weight": (9, 7), "b.bias": (11,)})
    merged, worst = vtzoo.merge(deltas, "tall[threshold=0.6]", base=base, coef=COEF), 0.0
    for name, place in PLACES.items():
        rows = [w * (d.tensors[place] - base[name]).double().numpy() for w, d in zip(COEF, deltas, strict=True)]
        for row, delta in zip(rows, deltas, strict=True):
            wanted = np.where(np.abs(row) >= 0.6 * np.abs(sum(rows) - row), sum(rows), 0)
            got = (fold(base, merged, task=delta.tasks[0].name)[name] - base[name]).double().numpy()
            worst = max(worst, float(np.abs(got - wanted).max() / np.abs(wanted).max()))
    agree("tall", "its tasks' networks", TOLERANCE, merged=worst)


def test_cat(agree):
    """The product of the factors set side by side, as PEFT stacks them."""
    draw = np.random.default_rng(0)
    factors = [(draw.normal(size=(13, 2)), draw.normal(size=(2, 7))) for _ in COEF]
    name = "blocks.0.a.weight"
    sources = [Fresh({name: torch.from_numpy(b @ a).float()}) for b, a in factors]
    wanted = np.concatenate([w * b for w, (b, _) in zip(COEF, factors, strict=True)], 1) @ np.concatenate(
        [a for _, a in factors], 0
    )
    matching(agree, "cat", lambda _: wanted, sources, shapes={name: SHAPES[name]})


class Thin(Fresh):
    """Task vectors that know their matrices as products; the products themselves only where allowed."""

    def __init__(self, dense, rank, seed, allowed):
        draw = torch.Generator().manual_seed(seed)
        self.pairs = {
            n: tuple(
                0.3 * torch.randn(*s, generator=draw) for s in ((dense[n].shape[0], rank), (rank, dense[n][0].numel()))
            )
            for n in MATRICES
        }
        super().__init__(
            {
                n: (self.pairs[n][0] @ self.pairs[n][1]).reshape(t.shape) if n in self.pairs else t
                for n, t in dense.items()
            }
        )
        self.allowed = allowed

    def factors(self, name):
        """Both halves."""
        return self.pairs.get(name)

    def __getitem__(self, name):
        assert self.allowed or name not in self.pairs, f"{name} was multiplied out"
        return super().__getitem__(name)


@pytest.mark.parametrize(
    ("spec", "allowed"),
    [("tsv", False), ("iso-cts", True), ("esm", True), ("core+ties", True), ("knots+ties", True)],
)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_factors_merge_as_their_products(spec, allowed, rank, agree):
    """A LoRA kept as two matrices merges as their product does; TSV never makes it."""
    thin = [Thin(t, rank, i, allowed) for i, t in enumerate(tasks(3))]
    dense = [Fresh(t.items()) for t in thin]
    draw, told = torch.Generator().manual_seed(9), list[dict[str, torch.Tensor]]()
    for _ in COEF:
        seen = {n: torch.randn(40, math.prod(SHAPES[n][1:]), generator=draw) for n in sorted(MATRICES)}
        told.append({n: x.T @ x for n, x in seen.items()})
    whole, kept = (Whole(s, COEF, SHAPES, evidence=told) for s in (dense, thin))
    wanted, got = algorithm(steps(spec), whole), algorithm(steps(spec), kept)
    worst = max(float((wanted(n) - got(n)).abs().max() / wanted(n).abs().max()) for n in SHAPES)
    agree(spec, "dense", 1e-5, factors=worst)
    assert kept.norms() == pytest.approx(whole.norms(), rel=1e-6)


@pytest.mark.parametrize("spec", ["tsv", "core+ties", "knots+ties"])
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_factors_that_are_no_numbers_are_refused(spec, half, value):
    """NaN, infinity, and a product too large for float32 name the delta, as they do in a whole tensor."""
    thin = [Thin(t, 2, i, allowed=False) for i, t in enumerate(tasks(2))]
    thin[1].pairs["blocks.0.a.weight"][half].fill_(value)
    if value == 1e30:
        thin[1].pairs["blocks.0.a.weight"][1 - half].fill_(value)
    with pytest.raises(Corrupt, match=r"task vector 2: NaN or infinity in blocks\.0\.a\.weight"):
        algorithm(steps(spec), Whole(thin, (1.0, 1.0), SHAPES))("blocks.0.a.weight")


@pytest.mark.parametrize("apart", [0.0, 1e-6])
def test_factors_that_cancel_out_are_zero(apart):
    """An untrained PiSSA is B0 A0 - B0 A0: no direction of its rounding counts; the least training does."""
    thin = [Thin(t, 2, i, allowed=True) for i, t in enumerate(tasks(1))]
    for name, (left, right) in thin[0].pairs.items():
        later = right.double() * (1 + apart)
        thin[0].pairs[name] = torch.cat([left, -left], 1).double(), torch.cat([later, right.double()])
    merged = algorithm(steps("tsv"), Whole(thin, (1.0,), SHAPES))("blocks.0.a.weight")
    left, right = (m[:, :2] if m.shape[1] == 4 else m[2:] for m in thin[0].pairs["blocks.0.a.weight"])
    assert torch.allclose(merged.double(), apart * left @ right, rtol=1e-5, atol=0)


def test_svd_of_a_product_makes_no_product(monkeypatch):
    """By QR where the factors are thin, beside LAPACK's; the dense way's eigenvectors are out of reach."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*s, dtype=torch.float64, generator=draw) for s in ((9, 2), (2, 7)))
    monkeypatch.setattr(torch.linalg, "eigh", None)
    u, s, v = _spectral.svd(left, None, right)
    assert torch.allclose(u * s @ v, left @ right, rtol=0, atol=1e-14)
    assert torch.allclose(s, torch.linalg.svdvals(left @ right)[:2], rtol=1e-13)


@pytest.mark.parametrize("spec", LOW_RANK)
def test_what_stays_low_rank(spec):
    """Of task vectors of rank 1 the merges that say so make a matrix of rank 3 at most; the others make one of more."""
    shapes = {"blocks.0.a.weight": (24, 20), "blocks.1.a.weight": (20, 24)}
    sources = tasks(3, 1, shapes)
    kind = registry.load("merges", spec)
    draw = torch.Generator().manual_seed(1)
    rows = [{n: torch.randn(60, s[1], generator=draw) for n, s in shapes.items()} for _ in sources]
    facts = [
        {
            n: (x.T @ x if getattr(kind, "EVIDENCE", "grams") == "grams" else x.abs()[: shapes[n][0]])
            for n, x in r.items()
        }
        for r in rows
    ]
    if spec in ("adamerging", "greedy-soup"):
        facts = [dict.fromkeys(shapes, torch.tensor(0.5)) for _ in sources]
    count = 2 if spec == "slerp" else 3
    ground = Fresh({n: torch.randn(s, generator=draw) for n, s in shapes.items()})
    chain = steps(f"{spec}[share=0.1]" if spec == "cart" else spec)
    merged = algorithm(chain, Whole(sources[:count], COEF[:count], shapes, evidence=facts[:count], ground=ground))
    values = np.linalg.svd(merged("blocks.0.a.weight").double().numpy(), compute_uv=False)
    rank = int((values > 1e-5 * values[0]).sum())
    assert rank <= count if kind.LOW_RANK else rank > count
