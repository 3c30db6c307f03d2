"""fingerprint.py: a backbone's identity."""

import torch

from tests import families
from vtzoo.classifier import head_names
from vtzoo.fingerprint import base_state, fingerprint, fingerprint_of
from vtzoo.live import inject

SOME = {"b.weight": torch.ones(2, 3), "a": torch.arange(3.0), "head.weight": torch.ones(1)}


def test_form_and_order() -> None:
    """sha256: and 64 hex digits, whatever the order of names."""
    mark = fingerprint(SOME)
    assert mark.startswith("sha256:")
    assert len(mark) == 71
    assert fingerprint(dict(reversed(SOME.items()))) == mark


def test_name_shape_and_value_count() -> None:
    """A renamed, reshaped or changed tensor is another backbone."""
    mark = fingerprint(SOME)
    assert fingerprint({"c" if n == "a" else n: t for n, t in SOME.items()}) != mark
    assert fingerprint({**SOME, "b.weight": torch.ones(3, 2)}) != mark
    assert fingerprint({**SOME, "a": torch.tensor([0.0, 1.0, 2.0000002])}) != mark


def test_head_is_left_out() -> None:
    """Tensors below the head's names don't count; one that merely starts alike does."""
    mark = fingerprint(SOME, ("head",))
    assert fingerprint({**SOME, "head.weight": torch.zeros(9)}, ("head",)) == mark
    assert fingerprint({**SOME, "header.weight": torch.zeros(9)}, ("head",)) != mark


def test_storage_dtype_does_not_count() -> None:
    """Values stored in float16, loaded as float32 or float64, have one fingerprint."""
    half = {n: t.half() for n, t in SOME.items()}
    assert fingerprint(half) == fingerprint(SOME) == fingerprint({n: t.double() for n, t in half.items()})


def test_live_model_with_and_without_delta() -> None:
    """A delta and another head change nothing; other weights do."""
    mark = fingerprint_of(families.build("resnet"))
    assert fingerprint_of(inject(families.build("resnet"), "lora+bitfit")) == mark
    assert fingerprint_of(families.build("resnet", classes=2)) == mark
    assert fingerprint_of(families.build("resnet", seed=1)) != mark


def test_base_state_has_neither_head_nor_grafts() -> None:
    """The backbone's own tensors: what num_classes=0 leaves."""
    model = inject(families.build("vit"), "lora")
    assert set(base_state(model)) == {
        n for n in families.build("vit").state_dict() if not n.startswith(head_names(model))
    }
