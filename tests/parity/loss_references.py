"""What each loss should be: torchdistill's own, or the paper's formula in plain loops and float64."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.losses import Drawn, Loss, changed, draw, gradients, learning, load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # annotations of its models in torch.jit's words
    from torchdistill.losses import mid_level
    from torchdistill.models.wrapper import AttentionBasedFusion

FORMULA = "formula of the paper, in float64"


@dataclass(frozen=True)
class Case:
    """A loss, its reference's name and value, and how its inputs are drawn."""

    spec: str
    reference: str
    wanted: Callable[[Drawn, Loss], Tensor]
    draw: Callable[[int], Drawn] = draw


def differences(case: Case, seed: int, dtype: torch.dtype = torch.float64) -> tuple[float, float]:
    """Of value and largest gradient of the student's outputs, relative to the reference's, which is in float64."""
    drawn = case.draw(seed)
    theirs, ours = learning(drawn.student), learning(changed(drawn.student, lambda t: t.to(dtype)))
    loss = load(case.spec, drawn, seed)
    wanted = case.wanted(replace(drawn, student=theirs), loss)
    aimed = gradients(wanted, theirs)
    for module in (loss.bridge, loss.standard):
        if module is not None:
            module.to(dtype)
    teacher = changed(drawn.teacher, lambda t: t.to(dtype))
    value = loss(replace(drawn, student=ours, teacher=teacher))
    found = gradients(value, ours)
    assert set(found) >= set(aimed)
    largest = max(float(g.abs().max()) for g in aimed.values())
    apart = max(float((found[n].double() - g).abs().max()) for n, g in aimed.items())
    return float((value.double() - wanted).abs().detach()) / float(wanted.detach().abs()), apart / largest


def _theirs(
    name: str, spec: str, wanted: Callable[[Drawn, Loss], Tensor], drawing: Callable[[int], Drawn] = draw
) -> Case:
    return Case(spec, f"torchdistill 1.1.5 {name}", wanted, drawing)


def _io(value: Any) -> dict[str, Any]:
    return {".": {"input": value, "output": value}}


def _on_logits(drawn: Drawn, made: Callable[..., Any], labels: Tensor | None) -> Tensor:
    return made(".", "output", ".", "output")(_io(drawn.student.logits), _io(drawn.teacher.logits), labels)


def _kd(drawn: Drawn, _: Loss, name: str = "KDLoss") -> Tensor:
    return _on_logits(drawn, partial(getattr(mid_level, name), temperature=3.0, alpha=0.3), drawn.labels)


def _kd_alone(drawn: Drawn, _: Loss) -> Tensor:
    return 9 * _on_logits(drawn, partial(mid_level.KDLoss, temperature=3.0, alpha=0), None)


def _dist(drawn: Drawn, _: Loss) -> Tensor:
    alike = _on_logits(drawn, partial(mid_level.DISTLoss, beta=1.5, gamma=0.5, tau=2.0), None)
    return alike + F.cross_entropy(_there(drawn.student.logits), drawn.labels)


def _rkd(drawn: Drawn, _: Loss) -> Tensor:
    made = mid_level.RKDLoss(".", ".", dist_factor=25, angle_factor=50, reduction="mean")
    return made(_io(drawn.student.features), _io(drawn.teacher.features))


def _attention(drawn: Drawn, _: Loss) -> Tensor:
    count = range(len(drawn.student.maps))
    one = {"io": "output", "weight": 1}
    made = mid_level.ATLoss(
        {str(i): {"student": {**one, "path": str(i)}, "teacher": {**one, "path": str(i)}} for i in count}
    )
    return made(*({str(i): {"output": o.maps[i]} for i in count} for o in (drawn.student, drawn.teacher)))


def _mse(ours: Tensor, theirs: Tensor) -> Tensor:
    here = {"is_from_teacher": False, "module_path": ".", "io": "output"}
    made = mid_level.SimpleLossWrapper(torch.nn.MSELoss(), input=here, target={**here, "is_from_teacher": True})
    return made(_io(ours), _io(theirs), None)


def _feature(drawn: Drawn, loss: Loss) -> Tensor:
    assert loss.bridge is not None
    return _mse(F.linear(_there(drawn.student.features), *loss.bridge.parameters()), _there(drawn.teacher.features))


def _fitnet(drawn: Drawn, loss: Loss, mode: str = "bilinear") -> Tensor:
    assert loss.bridge is not None
    given, found = list(loss.bridge.parameters()), []
    for i, (ours, theirs) in enumerate(zip(drawn.student.maps, drawn.teacher.maps, strict=True)):
        wide = F.interpolate(ours, theirs.shape[-2:], mode=mode, align_corners=False, antialias=True)
        found.append(_mse(F.conv2d(wide, *given[2 * i : 2 * i + 2]), theirs))
    return sum(found, torch.zeros(())) / len(found)


def _review(drawn: Drawn, loss: Loss) -> Tensor:
    """Their fusions with this bridge's numbers, on square maps of equal size on both sides, which is all they take."""
    assert loss.bridge is not None
    made = mid_level.HierarchicalContextLoss(".", "output", ".", "output")
    own: Any = loss.bridge.get_submodule("fusions")
    total, behind = torch.zeros(()), None
    for i in reversed(range(len(own))):
        state = {n.replace("enter", "conv1").replace("leave", "conv2").replace("weigh.", "attention_conv.0."): t for n, t in own[i].state_dict().items()}  # fmt: skip
        middle, channels = own[i].enter[0].weight.shape[:2]
        fusion = AttentionBasedFusion(channels, middle, len(own[i].leave[0].weight), i < len(own) - 1).double()
        fusion.load_state_dict(state)
        out, behind = fusion(drawn.student.maps[i], behind, drawn.student.maps[i].shape[-1])
        total = total + made(_io((out, behind)), _io(drawn.teacher.maps[i]))
    return total


def _context(drawn: Drawn, loss: Loss) -> Tensor:
    """Their loss on what this bridge gives, with maps that are no squares."""
    assert loss.bridge is not None
    made = mid_level.HierarchicalContextLoss(".", "output", ".", "output")
    met = loss.bridge(drawn.student).maps
    return sum((made(_io((s, None)), _io(t)) for s, t in zip(met, drawn.teacher.maps, strict=True)), torch.zeros(()))


# ------------------------------------------------------------------------------------------------- the papers' formulas


def _there(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _softmax(row: Tensor, temperature: float = 1.0) -> list[Tensor]:
    powers = [(z / temperature).exp() for z in row]
    return [p / sum(powers) for p in powers]


def _kl(wanted: list[Tensor], found: list[Tensor]) -> Tensor:
    return sum((t * (t / s).log() for t, s in zip(wanted, found, strict=True)), torch.zeros(()))


def _images(drawn: Drawn) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The two networks' logits and the label of each."""
    yield from zip(_there(drawn.student.logits), _there(drawn.teacher.logits), drawn.labels.tolist(), strict=True)


def _mean(found: list[Tensor]) -> Tensor:
    return sum(found, torch.zeros(())) / len(found)


def _hard(drawn: Drawn, _: Loss) -> Tensor:
    found = []
    for ours, theirs, label in _images(drawn):
        p = _softmax(ours)
        found.append(-0.3 * p[int(theirs.argmax())].log() - 0.7 * p[label].log())
    return _mean(found)


def _dkd(drawn: Drawn, _: Loss, *, labelled: bool = True) -> Tensor:
    found = []
    for ours, theirs, given in _images(drawn):
        label = given if labelled else int(theirs.argmax())
        s, t = _softmax(ours, 4), _softmax(theirs, 4)
        sure = _kl([t[label], 1 - t[label]], [s[label], 1 - s[label]])
        rest = [[p / (1 - all_[label]) for c, p in enumerate(all_) if c != label] for all_ in (t, s)]
        found.append(16 * (sure + 8 * _kl(rest[0], rest[1])))
        if labelled:
            found[-1] = found[-1] - _softmax(ours)[label].log()
    return _mean(found)


def _mixed_dkd(drawn: Drawn, loss: Loss) -> Tensor:
    """Labels .7 of one class and .3 of the next: the first is the target, both have their share of the cross-entropy."""
    whole = drawn.labels.argmax(-1)
    terms = _dkd(replace(drawn, labels=whole), loss)
    logs = [torch.stack(_softmax(z)).log() for z in _there(drawn.student.logits)]
    ours = _mean([z[i] for z, i in zip(logs, whole, strict=True)])
    return terms + ours - _mean([(y * z).sum() for y, z in zip(drawn.labels, logs, strict=True)])


def _mixed(seed: int) -> Drawn:
    drawn = draw(seed)
    one = F.one_hot(drawn.labels, _there(drawn.student.logits).shape[-1]).double()
    return replace(drawn, labels=0.7 * one + 0.3 * one.roll(1, 1))


def _unlabelled(seed: int) -> Drawn:
    drawn = draw(seed)
    return replace(drawn, labels=torch.full_like(drawn.labels, -1))


def _token(drawn: Drawn, _: Loss, *, kind: str) -> Tensor:
    found = []
    for (ours, theirs, label), own in zip(_images(drawn), _there(drawn.student.token), strict=True):
        if kind == "hard":
            found.append(-0.5 * _softmax(own)[int(theirs.argmax())].log() - 0.5 * _softmax(ours)[label].log())
        else:
            found.append(0.1 * 9 * _kl(_softmax(theirs, 3), _softmax(own, 3)) - 0.9 * _softmax(ours)[label].log())
    return _mean(found)


def _projected(drawn: Drawn, loss: Loss) -> list[list[Tensor]]:
    assert loss.bridge is not None
    weight, bias = (p.detach() for p in loss.bridge.parameters())
    each = _there(drawn.student.features)
    return [
        [sum((w * h for w, h in zip(row, x, strict=True)), b) for row, b in zip(weight, bias, strict=True)]
        for x in each
    ]


def _squares(ours: list[list[Tensor]], theirs: np.ndarray) -> Tensor:
    return _mean([(a - float(b)) ** 2 for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)])


def _scores(drawn: Drawn, loss: Loss) -> Tensor:
    images, batch = drawn.images.numpy(), _there(drawn.teacher.features).numpy()
    columns = [images[:, c] for c in range(images.shape[1])]
    means = [math.fsum(c) / len(c) for c in columns]
    stds = [math.sqrt(math.fsum((v - m) ** 2 for v in c) / (len(c) - 1)) for c, m in zip(columns, means, strict=True)]
    return _squares(_projected(drawn, loss), (batch - means) / stds)


def _cosines(drawn: Drawn, loss: Loss) -> Tensor:
    found = []
    for x, y in zip(_projected(drawn, loss), _there(drawn.teacher.features), strict=True):
        dot = sum((a * b for a, b in zip(x, y, strict=True)), torch.zeros(()))
        found.append(1 - dot / (sum(a * a for a in x) * sum(b * b for b in y)) ** 0.5)
    return _mean(found)


def _signed(vectors: np.ndarray) -> np.ndarray:
    """Columns turned so that the largest entry of each is positive."""
    return np.stack([v * np.sign(v[np.abs(v).argmax()]) for v in vectors.T], 1)


def _phi_s(drawn: Drawn, loss: Loss) -> Tensor:
    """H U' (x - mean) / sqrt(mean eigenvalue), H_ij = (-1)^(bits that i and j share) / sqrt(width)."""
    images, batch = drawn.images.numpy(), _there(drawn.teacher.features).numpy()
    width, mean = images.shape[1], images.mean(0)
    covariance = sum(np.outer(x - mean, x - mean) for x in images) / (len(images) - 1)
    values, vectors = np.linalg.eigh(covariance)
    h = np.array([[(-1.0) ** (i & j).bit_count() for j in range(width)] for i in range(width)]) / width**0.5
    return _squares(_projected(drawn, loss), (batch - mean) @ (h @ _signed(vectors).T).T / values.mean() ** 0.5)


def _kdep(drawn: Drawn, _: Loss) -> Tensor:
    images, batch = drawn.images.numpy(), _there(drawn.teacher.features).numpy()
    ours = _there(drawn.student.features)
    mean = images.mean(0)
    _, _, vt = np.linalg.svd(images - mean, full_matrices=False)
    main = (batch - mean) @ _signed(vt.T)[:, : ours.shape[1]]
    return _squares([list(x) for x in ours], np.sign(main) * np.abs(main / 0.1) ** (1 / 3))


def _resized_attention(drawn: Drawn, _: Loss) -> Tensor:
    total = torch.zeros(())
    for ours, theirs in zip(drawn.student.maps, drawn.teacher.maps, strict=True):
        seen, wanted = (sum(c.abs() ** 3 for c in m.unbind(1)) / m.shape[1] for m in (ours, theirs))
        seen = F.interpolate(seen[:, None], wanted.shape[-2:], mode="bilinear", align_corners=False, antialias=True)[
            :, 0
        ]
        both = ([a / (a**2).sum() ** 0.5 for a in side] for side in (seen, wanted))
        total = total + _mean([((s - t) ** 2).mean() for s, t in zip(*both, strict=True)])
    return total


def _same_sizes(seed: int) -> Drawn:
    drawn = draw(seed)
    maps = [
        (tuple(s.shape[1:]), (t.shape[1], *s.shape[2:]))
        for s, t in zip(drawn.student.maps, drawn.teacher.maps, strict=True)
    ]
    return draw(seed, maps=maps)  # type: ignore[arg-type] - shapes of three


def _squared(seed: int) -> Drawn:
    n = 5 + seed % 4
    return draw(seed, maps=[((3, 2 * n, 2 * n), (4, 2 * n, 2 * n)), ((5, n, n), (6, n, n)), ((4, 2, 2), (3, 2, 2))])


CASES = [
    _theirs("KDLoss", "kd[temperature=3,alpha=0.7]", _kd),
    _theirs("KDLoss x T^2", "kd[temperature=3]", _kd_alone, _unlabelled),
    _theirs("LogitStdKDLoss", "kd[temperature=3,alpha=0.7,standardise=true]", partial(_kd, name="LogitStdKDLoss")),
    Case("hard[weight=0.3]", FORMULA, _hard),
    _theirs("DISTLoss + cross-entropy", "dist[beta=1.5,gamma=0.5,temperature=2]", _dist),
    Case("dkd", FORMULA, _dkd),
    Case("dkd", f"{FORMULA}, no labels", partial(_dkd, labelled=False), _unlabelled),
    Case("dkd", f"{FORMULA}, mixed labels", _mixed_dkd, _mixed),
    Case("token", FORMULA, partial(_token, kind="hard")),
    Case("token[kind=soft,weight=0.1]", FORMULA, partial(_token, kind="soft")),
    _theirs("SimpleLossWrapper(MSELoss)", "feature[standard=none]", _feature),
    Case("feature", FORMULA, _scores),
    Case("feature[standard=phi-s]", FORMULA, _phi_s, partial(draw, width=8)),
    Case("feature[kind=cosine,standard=none]", FORMULA, _cosines),
    _theirs("SimpleLossWrapper(MSELoss)", "fitnet", _fitnet),
    _theirs("SimpleLossWrapper(MSELoss)", "fitnet[interpolation=bicubic]", partial(_fitnet, mode="bicubic")),
    _theirs("ATLoss", "attention", _attention, _same_sizes),
    Case("attention[p=3]", f"{FORMULA}, other sizes", _resized_attention),
    _theirs("RKDLoss", "rkd", _rkd),
    _theirs("AttentionBasedFusion, HierarchicalContextLoss", "review", _review, _squared),
    _theirs("HierarchicalContextLoss, other sizes", "review", _context),
    Case("kdep", FORMULA, _kdep),
]
