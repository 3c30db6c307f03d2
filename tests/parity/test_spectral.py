"""Rotations, scales, spectra and sparse masks beside PEFT's in float64, and beside formulas written out anew."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import families
from tests.parity.rewrites import by_weights
from vtzoo import registry
from vtzoo.anatomy import Site, survey
from vtzoo.delta import Delta
from vtzoo.errors import UsageError
from vtzoo.folding import fold
from vtzoo.graft import rates, tensors_of
from vtzoo.live import attach, extract, inject
from vtzoo.methods import _rotation
from vtzoo.methods.svft import basis
from vtzoo.sensitivity import scores

peft = pytest.importorskip("peft")
boft_layer = pytest.importorskip("peft.tuners.boft.layer")


def _skew(packed: Tensor, size: int) -> Tensor:
    """A skew-symmetric matrix from what stands above its diagonal, row by row."""
    made, entries = torch.zeros(size, size, dtype=packed.dtype), iter(packed)
    for i in range(size):
        for j in range(i + 1, size):
            made[i, j] = next(entries)
            made[j, i] = -made[i, j]
    return made


def _size(packed: Tensor) -> int:
    """b from b (b - 1) / 2."""
    return round((1 + math.sqrt(1 + 8 * packed.shape[-1])) / 2)


def _sites(tensors: dict[str, Tensor], method: str) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        site, _, short = name.rpartition(f".{method}.")
        found.setdefault(site, {})[short] = value.detach()
    return found


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def _oft(layer, own) -> None:
    layer.oft_R["default"].weight.copy_(own["Q"][0])


def _boft(layer, own) -> None:
    size, s = _size(own["Q"]), layer.boft_s["default"]
    full = [[_skew(block, size) for block in factor] for factor in own["Q"]]
    layer.boft_R["default"].copy_(torch.stack([torch.stack(f) for f in full]))
    s.copy_(own["s"].reshape(s.shape))


def _ia3(layer, own) -> None:
    value, there = own["l"], layer.ia3_l["default"]
    if value.ndim == 2:  # keys and values of a fused qkv
        value = torch.cat([torch.ones_like(value[0]), value[0], value[1]])
    there.copy_(value.reshape(there.shape))


def _fourierft(layer, own) -> None:
    shape = (layer.out_features, layer.in_features)
    places = _drawn(own["c"].numel(), math.prod(shape), 777)
    layer.indices["default"] = torch.stack([places // shape[1], places % shape[1]])
    layer.fourierft_spectrum["default"].copy_(own["c"])


def _shira(layer, own) -> None:
    shape = (layer.out_features, layer.in_features)
    places = own["places"].long() if "places" in own else _drawn(own["s"].numel(), math.prod(shape), 4)
    layer.shira_indices["default"] = torch.stack([places // shape[1], places % shape[1]])
    layer.shira_weight["default"] = nn.Parameter(own["s"])


def _drawn(count: int, total: int, seed: int) -> Tensor:
    """The first of a shuffle by numpy's legacy generator."""
    return torch.tensor(sorted(np.random.RandomState(seed).permutation(total)[:count].tolist()))


def _oft_config(sites, *, size=8, coft=False, eps=6e-5, share=False):
    return peft.OFTConfig(
        oft_block_size=size, use_cayley_neumann=False, target_modules=sites, coft=coft, eps=eps, block_share=share
    )


CASES = {  # spec, family, PEFT's config for our sites, tensors into PEFT's layer
    "oft": ("oft[block=8]", "vit", _oft_config, _oft),
    "oft-nearest": ("oft[block=15]", "swin", lambda s: _oft_config(s, size=15), _oft),
    "oft-share": ("oft[block=8,share=true]", "vit", lambda s: _oft_config(s, share=True), _oft),
    "oft-eps": ("oft[block=8,eps=0.0625]", "vit", lambda s: _oft_config(s, coft=True, eps=0.0625), _oft),
    "oft-pointwise": ("oft[block=4]", "convnextv2", lambda s: _oft_config(s, size=4), _oft),
    "boft": (
        "boft[block=8,factors=1]",
        "vit",
        lambda s: peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=1, target_modules=s),
        _boft,
    ),
    "boft-factors": (
        "boft[block=4,factors=3]",
        "vit",
        lambda s: peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=s),
        _boft,
    ),
    "boft-convs": (
        "boft[block=4,factors=2]",
        "resnet",
        lambda s: peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=s),
        _boft,
    ),
    "ia3": (
        "ia3",
        "vit",
        lambda s: peft.IA3Config(target_modules=s, feedforward_modules=[n for n in s if "fc2" in n]),
        _ia3,
    ),
    "ia3-split": (
        "ia3",
        "pvt",
        lambda s: peft.IA3Config(target_modules=s, feedforward_modules=[n for n in s if "fc2" in n]),
        _ia3,
    ),
    "ia3-convs": ("ia3", "resnet", lambda s: peft.IA3Config(target_modules=s, feedforward_modules=s), _ia3),
    "ia3-grouped": ("ia3", "regnet", lambda s: peft.IA3Config(target_modules=s, feedforward_modules=s), _ia3),
    "ia3-outputs": (
        "ia3[outputs=conv|proj|fc1,inputs=[]]",
        "vit",
        lambda s: peft.IA3Config(target_modules=s, feedforward_modules=[]),
        _ia3,
    ),
    "fourierft": (
        "fourierft[n=100,alpha=20]",
        "vit",
        lambda s: peft.FourierFTConfig(n_frequency=100, scaling=20.0, target_modules=s),
        _fourierft,
    ),
    "fourierft-linears": (
        "fourierft[n=30,alpha=5]",
        "convnext",
        lambda s: peft.FourierFTConfig(n_frequency=30, scaling=5.0, target_modules=s),
        _fourierft,
    ),
    "shira": ("shira[fraction=0.05,seed=4]", "vit", lambda s: peft.ShiraConfig(r=1, target_modules=s), _shira),
    "shira-snip": ("shira[fraction=0.1,mask=snip]", "swin", lambda s: peft.ShiraConfig(r=1, target_modules=s), _shira),
}


class _Blocks:
    """What PEFT's extension for CUDA does: [n, d, h, h] -> [n, d h, d h]."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*row) for row in blocks])]


@pytest.fixture
def double(monkeypatch):
    """PEFT's Fourier transform runs in float32 whatever it is given."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _ours(spec: str, family: str) -> nn.Module:
    model = inject(families.build(family), spec, batches=families.labelled(family))
    families.perturb(tensors_of(model), scale=0.3)
    return model


@torch.no_grad()
def _pair(case: str, monkeypatch) -> tuple[nn.Module, nn.Module]:
    """Our model and PEFT's with the same tensors."""
    spec, family, config, put = CASES[case]
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: _Blocks)
    ours = _ours(spec, family)
    own = _sites(tensors_of(ours), spec.partition("[")[0])
    model = peft.get_peft_model(families.build(family), config(sorted(own))).double().eval()
    layers = dict(model.base_model.model.named_modules())
    for site, tensors in own.items():
        put(layers[site], tensors)
    return ours, model


@pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`", "ignore:Sparse invariant checks")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_peft_agrees(case: str, double, monkeypatch, agree) -> None:
    """Attached and folded, ours and PEFT's give the same weights and logits, which are not the base's."""
    spec, family = CASES[case][:2]
    ours, theirs = _pair(case, monkeypatch)
    x = families.batch(family)
    live, apart = ours(x), theirs(x)
    assert _difference(live, families.build(family)(x)) > 1e-3
    weights, folded, merged = _folded(ours, theirs, family)
    agree(
        spec, f"PEFT, {family}", 1e-12, attached=_difference(live, apart), weights=weights,
        folded=_difference(live, folded), merged=_difference(live, merged),
    )  # fmt: skip


def _folded(ours: nn.Module, theirs: nn.Module, family: str) -> tuple[float, Tensor, Tensor]:
    """How far folded weights are apart, and what both folded nets give."""
    tensors, plain = dict(fold(families.build(family).state_dict(), extract(ours))), families.build(family)
    plain.load_state_dict(tensors)
    merged, x = theirs.merge_and_unload(), families.batch(family)
    state = merged.state_dict()
    assert set(state) == set(tensors)
    return max(_difference(tensors[n], t) for n, t in state.items() if t.abs().max() > 0), plain(x), merged(x)


@torch.no_grad()
def test_peft_turns_patches_where_we_turn_weights(double, monkeypatch, agree) -> None:
    """On 3x3 convolutions PEFT's merged OFT is ours; unmerged it is another function, even before any training."""
    monkeypatch.setitem(CASES, "convs", ("oft[block=8,targets=layer1.*]", "resnet", _oft_config, _oft))
    ours, theirs = _pair("convs", monkeypatch)
    x = families.batch("resnet")
    live, apart = ours(x), theirs(x)
    weights, folded, merged = _folded(ours, theirs, "resnet")
    agree(
        "oft[block=8,targets=layer1.*]", "PEFT, resnet, merged only", 1e-12, weights=weights,
        folded=_difference(live, folded), merged=_difference(live, merged),
    )  # fmt: skip
    assert _difference(live, apart) > 1e-2
    fresh = peft.get_peft_model(families.build("resnet"), _oft_config(["layer1.0.conv2"])).double().eval()
    assert _difference(families.build("resnet")(x), fresh(x)) > 1e-2


def _turned(weight: Tensor, packed: Tensor, groups: int) -> Tensor:
    """W R^T group by group, R the product of butterfly factors as matrices."""
    size, rows = _size(packed), weight.reshape(groups, weight.shape[0] // groups, -1)
    total, one = rows.shape[-1], torch.eye(size, dtype=weight.dtype)
    made = []
    for g in range(groups):
        R = torch.eye(total, dtype=weight.dtype)
        for i, factor in enumerate(packed):
            mine = [factor[0]] * (total // size) if len(factor) == 1 else factor.chunk(groups)[g]
            Q = [_skew(q, size) for q in mine]
            P = torch.zeros(total, total, dtype=weight.dtype)
            for j in range(total):
                run, at, unit = 2 ** (i + 1) * (size // 2), j, max(1, size // 2)
                start, place, rest = (at // run * run, at % run // unit, at % unit) if i else (j, 0, 0)
                half = 2**i
                P[j, start + (2 * (place % half) + place // half) * unit + rest if i else j] = 1
            R = P @ torch.block_diag(*[(one - q) @ torch.linalg.inv(one + q) for q in Q]) @ P.mT @ R
        made.append(rows[g] @ R.mT)
    return torch.stack(made).reshape(weight.shape)


ROTATIONS = [
    ("oft[block=8]", "beit"),
    ("oft[block=4]", "regnet"),
    ("oft[share=true]", "nfnet"),
    ("oft[block=6,targets=depthwise]", "convnext"),
    ("boft[block=4,factors=3]", "swinv2"),
    ("boft[block=6,factors=4]", "regnet"),
    ("boft", "dinov3"),
    ("boft", "mobilenetv4"),
    ("boft", "nfnet"),
]


@pytest.mark.parametrize(("spec", "family"), ROTATIONS)
def test_rotations(spec: str, family: str, agree) -> None:
    """W R^T (and s), where weights are read, grouped or standardised, and where the factors do not fit everywhere."""

    def edit(here, own, site):
        edited = {"weight": _turned(here["weight"], own["Q"], site.facts.get("groups", 1))}
        if "s" in own:
            scaled = "gain" if "gain" in here else "weight"
            edited[scaled] = {**here, **edited}[scaled] * own["s"].reshape(-1, *[1] * (here["weight"].ndim - 1))
        return edited

    agree(spec, f"rewrite, {family}", **by_weights(spec, family, edit))


def test_rotations_keep_angles_and_take_fewer_factors() -> None:
    """R is orthogonal; b is the nearest divisor; a layer has as many factors as b halves into."""
    blocks, one = _rotation.cayley(torch.randn(2, 4, 28, dtype=torch.float64), 8), torch.eye(32, dtype=torch.float64)
    R = _rotation.turn(one, blocks)
    assert torch.allclose(R @ R.mT, one)
    assert torch.allclose(_rotation.turn(R, blocks, back=True), one)
    assert [_rotation.fit(*p) for p in ((16, 384), (16, 72), (15, 32), (10, 64), (9, 7), (16, 31))] == [
        16,
        18,
        16,
        8,
        7,
        31,
    ]
    tensors = tensors_of(inject(families.build("resnet"), "boft[block=8,factors=3]"))
    held = {n: t.shape for n, t in tensors.items() if n.endswith("Q")}
    assert held["layer1.0.conv2.boft.Q"] == (1, 9, 28)  # 72 inputs
    assert held["layer2.0.conv2.boft.Q"] == (2, 18, 28)  # 144
    half = _rotation.cayley(torch.ones(1, 1, dtype=torch.bfloat16), 2)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["beit", "maxvit", "cait", "mixer", "mobilenetv4", "nfnet"])
def test_ia3(family: str, agree) -> None:
    """Rows of keys and values with their biases, columns after the activation, wherever they stand."""

    def edit(here, own, site):
        weight, out, by_head = here["weight"], site.shape[0], site.facts.get("heads", 1)
        if site.facts["side"] == "in":
            columns = own["l"].reshape(site.facts.get("groups", 1), -1)
            rows = columns.repeat_interleave(out // len(columns), 0)
            return {"weight": weight * rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))}
        rows = own["l"]
        if rows.ndim == 2:
            parts = torch.stack([torch.ones_like(rows[0]), *rows])
            width = out // 3 // by_head
            rows = torch.cat([parts[p, h * width : (h + 1) * width] for h in range(by_head) for p in range(3)])
        edited = {"weight": weight * rows.reshape(-1, *[1] * (weight.ndim - 1))}
        return {**edited, "bias": here["bias"] * rows} if "bias" in here else edited

    agree("ia3", f"rewrite, {family}", **by_weights("ia3", family, edit))


@torch.no_grad()
def test_ia3_scales_keys_and_values() -> None:
    """Without its values an attention gives its last bias, also where qkv go by head; without keys it averages the values."""
    for family, block in (("vit", "blocks.0.attn"), ("maxvit", "stages.1.blocks.0.attn_grid.attn")):
        model = inject(families.build(family), "ia3")
        attention, seen = model.get_submodule(block), []
        attention.register_forward_hook(lambda _m, _x, y, seen=seen: seen.append(y))
        attention.qkv.ia3.l[1].zero_()
        model(families.batch(family))
        assert torch.allclose(seen[0], attention.proj.bias.expand_as(seen[0]))
    model = inject(families.build("vit"), "ia3")
    attention, x = model.blocks[0].attn, torch.randn(2, 7, 32, dtype=torch.float64)
    values = attention.qkv(x)[..., 64:].mean(1, keepdim=True)
    attention.qkv.ia3.l[0].zero_()
    assert torch.allclose(attention(x), attention.proj(values).expand(-1, 7, -1))


def _cosines(own: dict[str, Tensor], rows: int, columns: int, alpha: float, seed: int) -> Tensor:
    """The sum over the coefficients of alpha c cos(2 pi (u p / rows + v q / columns)) / (rows columns)."""
    p, q = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(columns, dtype=torch.float64)
    made = torch.zeros(rows, columns, dtype=torch.float64)
    for place, c in zip(_drawn(own["c"].numel(), rows * columns, seed).tolist(), own["c"], strict=True):
        made += c * torch.cos(2 * math.pi * (place // columns * p / rows + place % columns * q / columns))
    return made * alpha / (rows * columns)


@pytest.mark.parametrize("family", ["vit", "beit", "resnet", "regnet"])
def test_fourierft(family: str, agree) -> None:
    """A few cosines at the drawn frequencies, where weights are read and on convolutions too."""

    def edit(here, own, _site):
        weight = here["weight"]
        change = _cosines(own, weight.shape[0], weight[0].numel(), 50.0, 3)
        return {"weight": weight + change.reshape(weight.shape)}

    spec = "fourierft[n=20,alpha=50,seed=3]"
    agree(spec, f"rewrite, {family}", **by_weights(spec, family, edit))


def test_fourierft_scale() -> None:
    """Unless given alpha is 300 at 768 x 768 and in proportion to the entries elsewhere."""
    method = registry.load("methods", "fourierft")
    for shape in ((768, 768), (96, 32)):
        child = method.Graft(Site(name="a", kind="linear", shape=shape), method.Config())
        assert child.alpha / math.prod(shape) == pytest.approx(300 / 768**2)
    assert method.Graft(Site(name="a", kind="linear", shape=(9, 9)), method.Config(alpha=5)).alpha == 5


def test_fourierft_start() -> None:
    """With init_std=1 coefficients start as N(0, 1), by default at zero; they learn 10 times as fast as the head."""
    drawn = torch.cat(list(tensors_of(inject(families.build("vit"), "fourierft[init_std=1]")).values()))
    assert abs(drawn.mean()) < 0.03
    assert abs(drawn.std() - 1) < 0.03
    model = inject(families.build("vit"), "fourierft")
    assert not any(t.any() for t in tensors_of(model).values())
    assert set(rates(model).values()) == {10.0}


@pytest.mark.parametrize(
    ("spec", "family"),
    [
        ("shira[fraction=0.1]", "swinv2"),
        ("shira[fraction=0.1,mask=magnitude]", "resnet"),
        ("shira[fraction=0.1,mask=gradient]", "beit"),
        ("shira[fraction=0.1,mask=snip]", "regnet"),
    ],
)
def test_shira(spec: str, family: str, agree) -> None:
    """The entries that rate highest change and no others, where weights are read and on convolutions too."""
    model = families.build(family)
    found, weights = scores(model, families.labelled(family)), dict(model.named_parameters())

    def edit(here, own, site):
        key = site.key("weight")
        rated = {
            "magnitude": weights[key].abs(),
            "gradient": found[key],
            "snip": found[key] * weights[key] ** 2,
        }.get(spec.partition("mask=")[2].rstrip("]"))
        total, count = here["weight"].numel(), max(16, round(0.1 * here["weight"].numel()))
        drawn = (
            _drawn(count, total, 0) if rated is None else rated.flatten().argsort(descending=True)[:count].sort().values
        )
        weight = here["weight"].clone().flatten()
        for place, s in zip(drawn.tolist(), own["s"], strict=True):
            weight[place] += s
        return {"weight": weight.reshape(here["weight"].shape)}

    agree(spec, f"rewrite, {family}", **by_weights(spec, family, edit))


def test_shira_stores_places_that_the_seed_does_not_give() -> None:
    """A random mask is drawn anew from its seed; the others keep 32-bit places beside the trained entries."""
    random, rated = (
        extract(inject(families.build("vit"), s, batches=families.labelled("vit"))).tensors
        for s in ("shira", "shira[mask=snip]")
    )
    assert not any("places" in n for n in random)
    places = {n: t for n, t in rated.items() if n.endswith("places")}
    assert {t.dtype for t in places.values()} == {torch.int32}
    assert len(places) == 8


def _between(weight: Tensor, m: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """The sum of m_ij u_i v_j^T, signs as the docstring says, by numpy."""
    U, _, Vt = np.linalg.svd(weight.flatten(1).numpy(), full_matrices=False)
    sign = np.sign(U[np.abs(U).argmax(0), np.arange(U.shape[1])])
    U, Vt = U * sign, Vt * sign[:, None]
    change = sum(float(c) * np.outer(U[:, i], Vt[j]) for c, (i, j) in zip(m, places, strict=True))
    return torch.from_numpy(change).reshape(weight.shape)


def _pattern(spec: str, rank: int, own: dict[str, Tensor]) -> list[tuple[int, int]]:
    if "plain" in spec:
        return [(i, i) for i in range(rank)]
    if "random" in spec:
        return [(p // rank, p % rank) for p in _drawn(own["m"].numel(), rank * rank, 6).tolist()]
    if "topk" in spec:
        return [(p // rank, p % rank) for p in own["places"].tolist()]
    return [(i, j) for i in range(rank) for j in range(rank) if abs(i - j) <= 3]


@pytest.mark.parametrize(
    ("spec", "family"),
    [
        ("svft[pattern=plain]", "vit"),
        ("svft[bands=3]", "vit"),
        ("svft[bands=3]", "beit"),
        ("svft[bands=3]", "resnet"),
        ("svft[bands=3]", "regnet"),
        ("svft[pattern=random,bands=1,seed=6]", "swinv2"),
        ("svft[pattern=topk,bands=1,targets=*attn.proj]", "vit"),
    ],
)
def test_svft(spec: str, family: str, agree) -> None:
    """The sum of m_ij u_i v_j^T over the pattern, with singular vectors by numpy."""

    def edit(here, own, site):
        rank = min(site.shape[0], math.prod(site.shape[1:]))
        return {"weight": here["weight"] + _between(here["weight"], own["m"], _pattern(spec, rank, own))}

    agree(spec, f"rewrite, {family}", **by_weights(spec, family, edit))


def test_svft_topk_takes_the_most_alike_pairs() -> None:
    """Places are those of the largest |u_i . v_j|, k as many as a band has."""
    model = inject(families.build("vit"), "svft[pattern=topk,bands=1,targets=*attn.proj]")
    weight = families.build("vit").blocks[1].attn.proj.weight.detach().numpy()
    U, _, Vt = np.linalg.svd(weight)
    alike = np.abs(U.T @ Vt.T).ravel()
    assert sorted(np.argsort(-alike)[: 32 * 3 - 2].tolist()) == model.blocks[1].attn.proj.svft.places.tolist()


def test_svft_basis_is_fixed() -> None:
    """U S V^T is the weight, each u's largest entry is positive, and directions without weight are left out."""
    weight = torch.randn(12, 8, dtype=torch.float64) @ torch.diag(torch.tensor([1.0] * 6 + [0.0] * 2).double())
    U, Vt = basis(weight)
    assert torch.allclose(U @ (U.mT @ weight @ Vt.mT) @ Vt, weight)
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    assert (largest[0, :6] > 0).all()
    assert not U[:, 6:].any()
    assert not Vt[6:].any()
    for flip in (U * -1, U):
        again, _ = basis(flip @ torch.diag(torch.arange(8.0, 0, -1).double()) @ Vt)
        assert torch.allclose(again[:, :6], U[:, :6])


def test_svft_decomposes_once(monkeypatch, tmp_path) -> None:
    """Singular vectors are found as the delta is attached, never in a forward pass, and no file holds them."""
    delta = extract(inject(families.build("vit"), "svft"))
    delta.save(tmp_path / "d.safetensors")
    assert {n.rpartition(".")[2] for n in delta.tensors if not n.startswith("@")} == {"m"}
    model = attach(families.build("vit"), Delta.open(tmp_path / "d.safetensors"))
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("decomposed again"))
    model(families.batch("vit")).sum().backward()
    assert set(rates(model).values()) == {5.0}


REFUSALS = [
    ("svft[pattern=topk]", "vit", "those of blocks.0.attn.qkv have 96 and 32 entries"),
    ("ia3[outputs=conv,inputs=[]]", "nfnet", "standardises its weight"),
    ("ia3[inputs=depthwise]", "nfnet", "names nothing"),
    ("ia3[outputs=fc2,inputs=fc2]", "vit", "stands in outputs and in inputs"),
    ("ia3[outputs=[],inputs=[]]", "vit", "nothing to scale"),
]


@pytest.mark.parametrize(("spec", "family", "words"), REFUSALS)
def test_refusals(spec: str, family: str, words: str) -> None:
    """What can't be done is refused with what was seen and what to type."""
    with pytest.raises(UsageError, match=words.replace("[", r"\[")) as refusal:
        inject(families.build(family), spec)
    assert refusal.value.hint


@pytest.mark.parametrize("mask", ["gradient", "snip"])
def test_shira_wants_images(mask: str) -> None:
    """A mask by gradients is refused where there are no images to take them on."""
    with pytest.raises(UsageError, match="no images"):
        inject(families.build("vit"), f"shira[mask={mask}]")


def test_refusals_that_no_family_meets() -> None:
    """A lone input can't be turned; a fused qkv in no known order can't be scaled in part."""
    with pytest.raises(UsageError, match="one input"):
        _rotation.inputs(Site(name="a", kind="conv", shape=(4, 1, 1, 1)))
    method, anatomy = registry.load("methods", "ia3"), survey(families.build("vit"))
    unknown = SimpleNamespace(modules=anatomy.modules, select=anatomy.select, value_last=lambda *_: False)
    with pytest.raises(UsageError, match="neither in all nor by head"):
        method.sites(unknown, method.Config())
