"""YAML that people write and pass on (recipes, merges, sweeps) as maps of knobs, read with limits.

Anchors are welcome, as long as the whole, each of them written out where it is used, stays small: an alias bomb doesn't. Numbers have at most
WORD_LIMIT characters, since longer ones take Python ages. Of equal keys PyYAML takes the last, and it takes on, off, yes and no for truths, as
YAML 1.2 doesn't; here the first is refused, and the others are words.
"""

from collections.abc import Mapping
from typing import Any, cast

import yaml

from vtzoo.errors import UsageError

LIMIT_BYTES, VALUE_LIMIT, DEPTH_LIMIT, WORD_LIMIT = 1 << 20, 20_000, 32, 64
_NUMBERS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))


def mapping(text: str, where: str, hint: str) -> Mapping[str, Any]:
    """A file's text as a mapping of knobs; `where` names it in messages.

    Raises:
        UsageError: it is no YAML, no mapping, says something twice, or is larger than such a file is.
    """
    if len(text) > LIMIT_BYTES:
        raise UsageError(f"{where} has more than {LIMIT_BYTES} characters", hint)
    try:
        content: Any = _Reader(text, where).get_single_data()
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or str(error)
        raise UsageError(f"{where} is no YAML: {reason.splitlines()[0]}", hint) from None
    except (ValueError, OverflowError) as error:  # of a number or a date
        raise UsageError(f"{where} is no YAML: {error}", hint) from None
    if not isinstance(content, Mapping):
        raise UsageError(f"{where} is no mapping", hint)
    return cast("Mapping[str, Any]", content)


class _Reader(yaml.SafeLoader):
    """Counts what it composes."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's way to say so
        first: [(tag, regex) for tag, regex in known if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str, where: str) -> None:
        super().__init__(text)
        self._where = where
        self._made = self._depth = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # by node: values and levels below it, aliases written out

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        self._made, self._depth = self._made + 1, self._depth + 1
        self._check(self._made, self._depth, mark)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if id(node) not in self._sizes:
            if alias:
                raise yaml.MarkedYAMLError(problem="something holds itself", problem_mark=mark)
            self._sizes[id(node)] = self._size(node)
        self._check(*self._sizes[id(node)], mark)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if len(set(keys)) < len(keys):
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise UsageError(
                f"{self._where}, line {node.start_mark.line + 1}: '{twice}' is given twice", "leave one out"
            )
        return super().construct_mapping(node, deep=deep)

    def _size(self, node: Any) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            if node.tag in _NUMBERS and len(node.value) > WORD_LIMIT:
                problem = f"a number of {len(node.value)} characters"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
            return 1, 1
        parts = [p for item in node.value for p in (item if isinstance(item, tuple) else (item,))]
        sizes = [self._sizes[id(part)] for part in parts]
        return 1 + sum(s for s, _ in sizes), 1 + max((d for _, d in sizes), default=0)

    def _check(self, size: int, depth: int, mark: Any) -> None:
        if size > VALUE_LIMIT or depth > DEPTH_LIMIT:
            problem = f"it has more than {VALUE_LIMIT} values, or is nested more than {DEPTH_LIMIT} levels deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
