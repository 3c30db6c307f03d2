"""rebuilt.py: grafts from a delta's tensors, and their shapes alone."""

from dataclasses import dataclass, field, replace

from vtzoo import registry
from vtzoo.anatomy import Site
from vtzoo.rebuilt import skeleton

SITE = Site(name="a", kind="linear", shape=(6, 4))


@dataclass(frozen=True, kw_only=True)
class Silent(registry.load("methods", "lora").Config):
    """A config that doesn't print its rank."""

    rank: int = field(default=1, repr=False)


def test_a_skeleton_is_built_once_for_each_shape() -> None:
    """Equal method, site and knobs give one object; any other knob, site or method another, whatever it prints."""
    lora, loha = (registry.load("methods", m) for m in ("lora", "loha"))
    one = skeleton(lora, SITE, lora.Config(rank=2))
    assert one is skeleton(lora, replace(SITE), lora.Config(rank=2))
    assert one.A.shape == (2, 4)
    assert one.A.is_meta
    assert skeleton(lora, SITE, lora.Config(rank=3)).A.shape == (3, 4)
    assert skeleton(lora, replace(SITE, shape=(6, 5)), lora.Config(rank=2)).A.shape == (2, 5)
    assert type(skeleton(loha, SITE, loha.Config(rank=2))) is loha.Graft
    assert [skeleton(lora, SITE, Silent(rank=r)).A.shape[0] for r in (1, 4)] == [1, 4]
