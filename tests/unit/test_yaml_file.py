import re

import pytest

from vtzoo.errors import UsageError
from vtzoo.yaml_file import mapping

REFUSED = {
    "a key twice": ("lr: 1\nrecipe:\n  epochs: 2\n  epochs: 3\n", "f.yaml, line 3: 'epochs' is given twice"),
    "a list": ("- a\n", "f.yaml is no mapping"),
    "cut": ("a: [", "f.yaml is no YAML"),
    "a million characters": ("a: " + "b" * (1 << 20), "has more than 1048576 characters"),
    "many values": ("a: [" + "1," * 20_000 + "]", "more than 20000 values"),
    "deep": ("a: " + "[" * 200 + "]" * 200, "more than 32 levels deep"),
    "billion laughs": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "more than 20000 values",
    ),
    "merges upon merges": (
        "a: &a {k: 1}\n" + "".join(f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "more than 20000 values",
    ),
    "a chain of anchors": ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200)), "32 levels"),
    "a list in itself": ("a: &a [*a]", "something holds itself"),
    "an endless number": ("a: " + "9" * 5000, "a number of 5000 characters"),
    "endless in base 16": ("a: 0x" + "f" * 5000, "a number of 5002 characters"),
    "endless in base 60": ("a: 1" + ":59" * 5000, "a number of 15001 characters"),
    "no such day": ("a: 2001-99-99", "month must be in 1..12"),
    "a Python object": ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
    "a map as a key": ("{a: 1}: 2", "unhashable"),
    "a control character": ("a: \x07", "special characters are not allowed"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_such_file_says_is_refused_in_one_line(case: str) -> None:
    """Files that say something twice, and those that would take memory or time without end, are UsageError."""
    text, said = REFUSED[case]
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        mapping(text, "f.yaml", "hint")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


def test_on_and_off_are_words() -> None:
    """As in YAML 1.2; PyYAML takes them for truths, of which a knob such as `cache: off` knows nothing."""
    assert mapping("{a: off, b: On, c: no, d: true, e: False, f: null, g: 1}", "f.yaml", "") == {
        "a": "off", "b": "On", "c": "no", "d": True, "e": False, "f": None, "g": 1,
    }  # fmt: skip


def test_a_file_may_inherit() -> None:
    """YAML's own merging of mappings is no key given twice."""
    assert mapping("a: &x {p: 1, q: 1}\nb: {<<: *x, q: 2}\n", "f.yaml", "")["b"] == {"p": 1, "q": 2}
