"""The number of a delta's parameters is its closed form, written out here from the papers, not from the code.

A method that has no row here is still held to its docstring's "Parameters:" line by review.
"""

import math
from collections.abc import Callable

import pytest
from torch import nn

from tests import families
from tests.contract.cases import METHODS, SUPPORT, WORKS
from vtzoo.delta import Delta
from vtzoo.installed import head_state
from vtzoo.live import extract, inject

# A plain ViT of width D, MLP width H, L blocks, on a grid of 3 x 4 patches of 8 pixels, a class token, N classes.
D, H, L, P, N = 32, 128, 2, 3 * 8 * 8, families.CLASSES
LINEARS = ((D, 3 * D), (D, D), (D, H), (H, D))  # [in, out] of qkv, proj, fc1, fc2
BLOCK = sum(i * o + o for i, o in LINEARS) + 4 * D


def _rung(channels: int, d: int) -> int:
    """Of a side ladder of width d beside one transformer block: gate, way in, attention, MLP and their norms."""
    return 1 + (channels + 1) * d + 2 * d + (d + 1) * 3 * d + (d + 1) * d + 2 * d + (d + 1) * 4 * d + (4 * d + 1) * d


def _vit_adapter(*, groups: int, a: int, w: int) -> int:
    """Injectors and extractors with attentions of width a; convolutions that begin with w channels; necks and vector."""
    attention = 4 * D + (D + 1) * a + D * a + (D + 1) * a + (a + 1) * D
    hidden = D // 4
    extractor = attention + 2 * D + (D + 1) * hidden + (9 + 1) * hidden + (hidden + 1) * D
    convs = [(3, w), (w, w), (w, w), (w, 2 * w), (2 * w, 4 * w), (4 * w, 4 * w)]
    prior = sum(9 * i * o + 2 * o for i, o in convs) + sum((c + 1) * D for c in (w, 2 * w, 4 * w, 4 * w)) + 3 * D
    neck = 4 * D * D + D + 4 * 2 * D
    return groups * (attention + D) + (groups + 2) * extractor + prior + neck + (D + 1) * D


VIT = {
    "adapter": L * (2 * 8 * D + 8 + D + D),
    "adapter[placement=houlsby,rank=3]": 2 * L * (2 * 3 * D + 3 + D),
    "adapter[placement=intermediate]": L * (2 * 8 * D + 8 + D),
    "adapter[placement=pfeiffer]": L * (2 * 8 * D + 8 + D),
    "adapter[placement=intermediate,ranks=blocks.1.mlp:0]": 2 * 8 * D + 8 + D,
    "adapter[ranks=blocks.0:3]": L * 2 * D + (2 * 8 * D + 8) + (2 * 3 * D + 3),
    "adapter-bias": L * (D + H + 1),
    "adaptformer": L * (2 * 64 * D + 64 + D),
    "arc": 2 * D * D + L * 2 * (D + D),  # 50 is more than the width
    "arc[rank=5]": 2 * 5 * D + L * 2 * (5 + D),
    "bitfit": D + L * (2 * D + sum(o for _, o in LINEARS)) + D,
    "bi-lora": L * sum(32 * (i + o) // 8 + 4 for i, o in LINEARS),  # bytes, and two levels for each of two matrices
    "bi-lora[rank=3]": L * sum(3 * i // 8 + 3 * o // 8 + 4 for i, o in LINEARS),
    "boft": L * sum(2 * i * 7 // 2 + o for i, o in LINEARS),
    "boft[block=4,factors=3]": L * sum(3 * i * 3 // 2 + o for i, o in LINEARS),
    "compacter": 4**3 + L * 2 * 3 * (D + 24),
    "compacter[rank=6,order=2]": 2**3 + L * 2 * 3 * (D + 6),
    "consolidator": L * sum(i * o // 16 + o for i, o in LINEARS),  # half of D blocks
    "consolidator[groups=9]": L * sum(i * o // 8 + o for i, o in LINEARS),
    "difffit": D + L * (2 * D + sum(o for _, o in LINEARS)) + D + (2 * L + 1) * D + L * 2 * D,
    # four tiles as they are, [in, out] as in LINEARS: too narrow for squares at rank 32; twelve squares of D at a lower one
    "fact-tk": 32 * (D + H) + 32 * (3 * D + D + H) + 32**3 + L * 4 * 32,
    "fact-tk[rank=8]": 2 * 8 * D + 8**3 + L * 12 * 8,
    "fact-tt": 2 * 16 * D + L * 12 * 16**2,
    "fourierft": L * sum(min(3000, i * o) for i, o in LINEARS),
    "fourierft[n=50]": L * 4 * 50,
    "convpass": 2 * L * (2 * 8 * D + 8 + D + 9 * 8 * 8 + 8),
    "convpass[rank=3,attention_only=true]": L * (2 * 3 * D + 3 + D + 9 * 3 * 3 + 3),
    "dtl": L * 2 * 2 * D,
    "dtl[fusion=3,rank=5]": L * 2 * 5 * D + 9 * D,
    "full": P * D + D + D + 13 * D + L * BLOCK + 2 * D,
    "glora": L * sum(2 * 4 * (i + o) + o for i, o in LINEARS),
    "glora[a=vector,b=constant,c=lora,d=constant,e=none,rank=3]": L * sum(o + 1 + 3 * (i + 1) + 1 for i, o in LINEARS),
    "gps": (1 + 1 + 1) * (D + L * sum(o for _, o in LINEARS)),  # a weight, its place and the bias, of each neuron
    "gps[k=3,bias=false,targets=linear]": (3 + 3) * L * sum(o for _, o in LINEARS),
    "hydra": L * 8 * ((D + 3 * D) + (H + 3 * D)),
    "hydra[rank=2,targets=fc1]": L * 2 * (D + 3 * H),
    "ia3": L * (2 * D + H),
    "kadaptation": 32**3 + L * ((3 * D + 3 * D) + (D + D)),  # A of 32; u and v of qkv, three times, and of proj
    "kadaptation[order=8,targets=auto|mlp]": 8**3 + L * (6 * D + 2 * D + 2 * (D + H)),
    "linear": 0,
    "loha": L * 2 * 8 * sum(i + o for i, o in LINEARS),
    "loha[rank=2]": L * 2 * 2 * sum(i + o for i, o in LINEARS),
    # D = 4 * 8, 3D = 8 * 12, H = 8 * 16: w1 and w2 of qkv, proj, fc1 and fc2, whole at rank 8
    "lokr": L * ((8 * 4 + 12 * 8) + (4 * 4 + 8 * 8) + 2 * (8 * 4 + 16 * 8)),
    "lokr[rank=3]": L * ((8 * 4 + 3 * (12 + 8)) + (4 * 4 + 3 * (8 + 8)) + 2 * (8 * 4 + 3 * (16 + 8))),
    "lokr[rank=1,decompose_both=true]": L * ((8 + 4 + 12 + 8) + (4 + 4 + 8 + 8) + 2 * (8 + 4 + 16 + 8)),
    "lokr[factor=2]": L * sum(2 * 2 + 8 * (i // 2 + o // 2) for i, o in LINEARS),
    "lora": L * 8 * sum(i + o for i, o in LINEARS),
    "lora[dora=true]": L * sum(8 * (i + o) + o for i, o in LINEARS),
    "lora[ranks=blocks.1.*:0|fc1:2]": 8 * sum(i + o for i, o in LINEARS) - 6 * (D + H) + 2 * (D + H),
    "lora[ranks=fc1:2]": L * (8 * sum(i + o for i, o in LINEARS) - 6 * (D + H)),
    "lora[qkv=qv,targets=qkv,rank=3]": L * 2 * 3 * (D + D),
    "lora+ssf": L * 8 * sum(i + o for i, o in LINEARS) + 2 * (D + L * (2 * D + sum(o for _, o in LINEARS)) + D),
    "lst": L * _rung(D, 8) + (D + 1) * 8 + 2 * 8 + (8 + 1) * D,
    "lst[reduction=2]": L * _rung(D, 16) + (D + 1) * 16 + 2 * 16 + (16 + 1) * D,
    "mlp-head": 0,
    "mona": 2 * L * (4 * D + (64 * D + 64) + 64 * (9 + 25 + 49 + 3) + (64 * 64 + 64) + (64 * D + D)),
    "norm": (2 * L + 1) * 2 * D,
    "oft": L * sum(i * 15 // 2 for i, _ in LINEARS),
    "oft[block=8,share=true]": L * 4 * 28,
    "partial": BLOCK + 2 * D,
    "partial[blocks=2]": 2 * BLOCK + 2 * D,
    "pixel-prompt": 6 * 3 * (24 + 32 - 2 * 3),
    "pixel-prompt[kind=patch,size=5]": 3 * 5 * 5,
    "pixel-prompt[kind=full]": 3 * 24 * 32,
    "repadapter": 2 * L * ((8 * D + 8 * D // 2) + 8 + D),
    "repadapter[groups=1]": 2 * L * (2 * 8 * D + 8 + D),
    "rlrr": L * (sum(2 * o + i for i, o in LINEARS) + 2 * D),  # columns of q, k and v apart
    "sct": L * ((D // 8) ** 2 + D // 8),
    "sct[fraction=0.5,targets=fc1]": L * ((H // 2) ** 2 + H // 2),
    "shira": L * sum(max(16, round(i * o / 100)) for i, o in LINEARS),
    "shira[fraction=0.1,mask=magnitude]": 2 * L * sum(round(i * o / 10) for i, o in LINEARS),  # and their places
    "spt[budget=500,rank=0]": 500 + 500,  # and their places
    "side-tuning": 64 * 3 * 32 + 9 * (2 + 8 + 16) * 32**2 + 2 * 11 * 32 + (4 * 32 + 1) * D + 1,
    "ssf": 2 * (D + L * (2 * D + sum(o for _, o in LINEARS)) + D),
    "svft": L * 4 * (5 * D - 6),
    "svft[pattern=plain]": L * 4 * D,
    "svft[pattern=random,bands=1,targets=fc1]": L * (3 * D - 2),
    "vera": L * sum(256 + o for _, o in LINEARS),
    "vera[rank=5,targets=qkv|fc1]": L * (5 + 3 * D + 5 + H),
    "e2vpt": L * (10 + 5) * D + 10 * (1 + 16),
    "e2vpt[share=false,keys=2,tokens=3,segments=4]": L * (3 + 2 * 2) * D + 3 * (1 + 4),
    "gated-vpt": 20 * D + (L - 1) + L,
    "sa2vp": 12 * 16 + 16 * D + D + L * (2 * D + 2 * 16 * D + 16 + D),
    "vit-adapter": _vit_adapter(groups=L, a=D // 4, w=64),
    "vit-adapter[groups=1,ratio=0.5,conv=6]": _vit_adapter(groups=1, a=D // 2, w=6),
    "vpt-deep": L * 10 * D,
    "vpt-deep[tokens=4,lengths=blocks.0:3]": (4 + 3) * D,
    "vpt-deep[tokens=4,lengths=blocks.1:0]": 4 * D,
    "vpt-shallow": 20 * D,
    "vqt": L * 2 * D,
    "vqt[tokens=3]": L * 2 * 3 * D,
}


def _convs(model: nn.Module, *, blocks: bool = True) -> list[nn.Conv2d]:
    """The convolutions of a ResNet, those of its four layers or all."""
    return [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and (n.startswith("layer") or not blocks)]


def _last(model: nn.Module) -> list[nn.Conv2d]:
    """The last convolution of each of a ResNet's blocks."""
    blocks = [b for n, b in model.named_modules() if n.count(".") == 1 and n.startswith("layer")]
    return [getattr(b, "conv3", b.conv2) for b in blocks]


def _norms(model: nn.Module) -> int:
    return sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def _low_rank(conv: nn.Conv2d, rank: int) -> int:
    fan_in = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
    return min(rank, fan_in, conv.out_channels) * (fan_in + conv.out_channels)


def _fan_in(conv: nn.Conv2d) -> int:
    return conv.weight[0].numel()


def _halves(size: int) -> tuple[int, int]:
    first = max(n for n in range(1, size + 1) if size % n == 0 and n * n <= size)
    return first, size // first


def _kronecker(conv: nn.Conv2d) -> int:
    (a, c), (b, d) = _halves(conv.out_channels), _halves(conv.in_channels)
    return a * b + c + d * conv.weight[0, 0].numel()


def _rotated(conv: nn.Conv2d, block: int, factors: int = 1) -> int:
    """Half of a skew-symmetric matrix per block of the nearest size, once more where twice that size divides too."""
    total = _fan_in(conv)
    size = min((d for d in range(2, total + 1) if total % d == 0), key=lambda d: (abs(d - block), d))
    held = factors if size % 2 == 0 and total % (size * 2 ** (factors - 1)) == 0 else 1
    return held * total * (size - 1) // 2


def _full_rank(convs: list[nn.Conv2d]) -> int:
    """A tensor train's numbers at the highest rank: a square factor for each width, and cores as large as the weights."""
    widths = {c.in_channels for c in convs}, {c.out_channels for c in convs}
    return sum(w * w for side in widths for w in side) + sum(c.weight.numel() for c in convs)


def _conv_adapters(model: nn.Module) -> int:
    """At each block's first 3x3, of C inputs (8 divides each): K of width C/8, the pointwise one, their biases, a scale."""
    blocks = [b for i in range(1, 5) for b in getattr(model, f"layer{i}")]
    convs = [next(c for c in _convs(b, blocks=False) if c.kernel_size == (3, 3)) for b in blocks]
    return sum(9 * c.in_channels + c.in_channels // 8 * (1 + c.out_channels) + 2 * c.out_channels for c in convs)


RESNET: dict[str, Callable[[nn.Module], int]] = {
    "adapter-bias[targets=conv]": lambda m: sum(c.weight[0].numel() + c.out_channels for c in _convs(m, blocks=False)),
    "bitfit": _norms,  # its convolutions have no bias
    "boft": lambda m: sum(_rotated(c, 8, factors=2) + c.out_channels for c in _convs(m)),
    "fourierft[n=50]": lambda m: sum(min(50, c.weight.numel()) for c in _convs(m)),
    "conv-adapter": _conv_adapters,
    "consolidator[groups=4]": lambda m: sum(c.weight.numel() // 4 for c in _convs(m)),
    "difffit": lambda m: 2 * _norms(m),
    "dtl": lambda m: 2 * 2 * m.layer1[1].conv1.in_channels,  # the one block that keeps its shape
    "full": lambda m: sum(p.numel() for n, p in m.named_parameters() if not n.startswith("fc.")),
    "glora[rank=3]": lambda m: sum(2 * _low_rank(c, 3) for c in _convs(m)),
    "hydra[rank=3]": lambda m: sum(_low_rank(c, 3) + 2 * 3 * c.out_channels for c in _convs(m)),
    "gps": lambda m: 2 * sum(c.out_channels for c in _convs(m, blocks=False)),
    "ia3": lambda m: sum(c.in_channels for c in _convs(m)),
    "kadaptation": lambda m: (
        sum(n**3 for n in {math.gcd(c.out_channels, _fan_in(c)) for c in _convs(m)})
        + sum(c.out_channels + _fan_in(c) for c in _convs(m))
    ),
    "fact-tt[rank=99]": lambda m: _full_rank(_convs(m)),
    "linear": lambda _: 0,
    "loha[rank=3]": lambda m: sum(2 * 3 * (_fan_in(c) + c.out_channels) for c in _convs(m)),
    "lokr[rank=1]": lambda m: sum(_kronecker(c) for c in _convs(m)),
    "lora[rank=3]": lambda m: sum(_low_rank(c, 3) for c in _convs(m)),
    "norm": lambda m: 2 * _norms(m),
    "oft": lambda m: sum(_rotated(c, 16) for c in _convs(m)),
    "residual": lambda m: sum(c.out_channels * c.in_channels for c in _convs(m) if c.kernel_size == (3, 3)),
    "residual[kind=series]": lambda m: sum(c.out_channels**2 for c in _convs(m) if c.kernel_size == (3, 3)),
    "shira": lambda m: sum(max(16, round(c.weight.numel() / 100)) for c in _convs(m)),
    "spt[budget=500,rank=0]": lambda _: 500 + 500,
    "rlrr": lambda m: sum(c.out_channels + c.weight[0].numel() for c in _convs(m)),
    "sct": lambda m: sum(round(c.out_channels / 8) ** 2 for c in _last(m)),
    "side-tuning[width=4]": lambda m: 64 * 3 * 4 + 9 * 26 * 4**2 + 2 * 11 * 4 + (4 * 4 + 1) * m.num_features + 1,
    "ssf": lambda m: sum(c.out_channels for c in _convs(m, blocks=False)) + 2 * _norms(m),
    "svft[pattern=plain]": lambda m: sum(min(c.out_channels, _fan_in(c)) for c in _convs(m)),
    "vera[rank=5]": lambda m: sum(5 + c.out_channels for c in _convs(m)),
}


def _delta(spec: str, family: str) -> tuple[Delta, nn.Module]:
    model = inject(families.build(family), spec, batches=families.labelled(family))
    return extract(model), model


@pytest.mark.parametrize("spec", VIT)
def test_count_on_a_transformer(spec: str) -> None:
    """On a ViT the delta holds as many numbers as its formula in D, H and L says."""
    delta, _ = _delta(spec, "vit")
    assert delta.size == VIT[spec]


@pytest.mark.parametrize("spec", RESNET)
def test_count_on_a_convolutional_network(spec: str) -> None:
    """On a ResNet the delta holds as many numbers as its formula over the layers says."""
    delta, _ = _delta(spec, "resnet")
    assert delta.size == RESNET[spec](families.build("resnet"))


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("linear", (D + 1) * N),
        ("mlp-head", (D + 1) * D + (D + 1) * N),
        ("mlp-head[hidden=5,skip=true]", (D + 1) * 5 + (5 + 1) * N + D * N),
    ],
)
def test_count_of_the_head(spec: str, count: int) -> None:
    """The methods of the head alone hold their formula's numbers in the head."""
    _, model = _delta(spec, "vit")
    assert sum(t.numel() for t in head_state(model).values()) == count


@pytest.mark.parametrize("method", [m for m in METHODS if SUPPORT[m]["vit"] in WORKS])
def test_count_grows_with_depth_as_said(method: str) -> None:
    """A method that acts in every block grows by the same number with each block; the others don't grow."""
    two, three, four = (
        extract(inject(families.build("vit", depth=d), method, batches=families.labelled("vit"))).size
        for d in (2, 3, 4)
    )
    rounded = (
        2 if method == "spt" else 0
    )  # its budget is a share of the backbone: one number more or less, and its place
    assert abs((three - two) - (four - three)) <= rounded
    assert three >= two
