"""The grammar people type: `lora[rank=8,targets=qkv|proj]+bitfit`, and its decoding into typed knobs.

    spec  = part { "+" part }
    part  = name [ "[" knob { "," knob } "]" ]
    knob  = key "=" value          value: a scalar, a|b|c, or [a,b,c]

A method's schema is its frozen `Config` dataclass; a merge's or loss's is the keyword-only parameters of its
function. pydantic decodes; every error of a spec is reported at once, and an unknown knob is refused.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError, create_model, with_config

from vtzoo.errors import UsageError, did_you_mean

T = TypeVar("T")
_NAME = re.compile(r"[a-z0-9][a-z0-9._/-]*")  # of a method, merge or loss, or of an entry with arguments
_EXPONENT = re.compile(r"(?<![\w.])(\d+\.?\d*e|\.\d+e)\+(?=\d+\s*\*)", re.IGNORECASE)  # 1e+3* is a factor, no sum


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One named piece of a spec with its knobs still as text."""

    name: str
    knobs: dict[str, str | list[str]]

    def __str__(self) -> str:
        inside = ",".join(f"{k}={'|'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in self.knobs.items())
        return f"{self.name}[{inside}]" if inside else self.name


def parse(spec: str) -> list[Part]:
    """Split a spec into its parts, in the order written.

    Raises:
        UsageError: the text does not follow the grammar.
    """
    parts = [_part(text.strip(), spec) for text in _split(spec, "+")]
    if not parts:
        raise UsageError("the spec is empty", "write a name such as lora[rank=8]")
    return parts


def weighted(spec: str) -> list[tuple[float, Part]]:
    """The parts of a sum such as `kd[temperature=4]+0.5*feature`, each with its factor.

    Raises:
        UsageError: the text does not follow the grammar, or a factor is not a positive number.
    """
    found: list[tuple[float, Part]] = []
    for text in _split(_EXPONENT.sub(r"\1", spec), "+"):
        factor, star, rest = text.partition("*")
        if "[" in factor or not star:
            factor, rest = "1", text
        try:
            weight = float(factor)
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise UsageError(f"'{factor.strip()}' in '{spec}' is no positive factor", "for example kd+0.5*feature")
        found.append((weight, one(rest.strip())))
    if not found:
        raise UsageError("the spec is empty", "write a name such as kd[temperature=4]")
    return found


def one(spec: str) -> Part:
    """A spec of exactly one part (merges and losses do not stack with `+`)."""
    parts = parse(spec)
    if len(parts) != 1:
        raise UsageError(f"'{spec}' names {len(parts)} things where one is wanted", f"write {parts[0].name}[…] alone")
    return parts[0]


def arguments(text: str) -> Part:
    """A ref of any kind, with what stands in brackets behind it: "fashion/kd", "./student[drop_rate=0.1]".

    Raises:
        UsageError: what stands there does not follow the grammar.
    """
    name, bracket, rest = text.partition("[")
    if bracket and not rest.endswith("]"):
        raise UsageError(f"'{text}' is not NAME[argument=value,…]", "close the bracket, and write nothing behind it")
    return Part(name, _part(f"ref[{rest}", text).knobs if bracket else {})


def decode(schema: type[T] | Callable[..., Any], values: Mapping[str, Any], what: str) -> T | dict[str, Any]:
    """Decode text or YAML values against a dataclass (giving an instance) or a function (giving keyword arguments).

    Raises:
        UsageError: unknown knobs and wrong values, all at once, with the nearest knob's name.
    """
    fields = _fields(schema)
    wrong = [f"no knob '{k}' ({did_you_mean(k, fields) or 'it has none'})" for k in values if k not in fields]
    hint = f"knobs of {what}: {', '.join(fields) or 'none'}" if wrong else "give it another value, or leave it out"
    ready = {k: _shape(v, fields[k]) for k, v in values.items() if k in fields}
    try:
        result = _adapter(schema).validate_python(ready)
    except ValidationError as error:
        wrong += [_say(e) for e in error.errors()]
    else:
        if not wrong:
            return result if dataclasses.is_dataclass(schema) else result.model_dump()
    raise UsageError(f"{what}: " + "; ".join(wrong), hint)


def whole(value: Any) -> Any:
    """A count as people write it, for a whole-number knob: 300000, 300k and 0.3M; anything else as it is."""
    unit = {"k": 10**3, "m": 10**6}.get(value[-1:].lower()) if isinstance(value, str) else None
    if unit is None:
        return value
    try:
        count = round(float(value[:-1]) * unit, 6)
    except ValueError:
        return value
    return int(count) if count.is_integer() else value


def encode(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values; `decode` gives it back."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _split(text: str, at: str) -> list[str]:
    """Split at a separator outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c == "[") - (c == "]")
        if depth < 0:
            break
        if c == at and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    if depth != 0:
        raise UsageError(f"brackets do not match in '{text}'", "write name[knob=value,knob=value]")
    return [*parts, text[start:]] if text.strip() else []


def _part(text: str, spec: str) -> Part:
    name, bracket, rest = text.partition("[")
    if not _NAME.fullmatch(name) or (bracket and not rest.endswith("]")):
        raise UsageError(f"'{text}' in '{spec}' is not name[knob=value,…]", "for example lora[rank=8]+bitfit")
    knobs: dict[str, str | list[str]] = {}
    for item in _split(rest[:-1], ",") if bracket else []:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"'{item}' in '{spec}' is not knob=value", f"for example {name}[knob=value]")
        if key.strip() in knobs:
            raise UsageError(f"knob '{key.strip()}' stands twice in '{spec}'", "keep one of them")
        knobs[key.strip()] = _value(value.strip())
    return Part(name, knobs)


def _value(text: str) -> str | list[str]:
    if text.startswith("[") and text.endswith("]"):
        return [v.strip() for v in text[1:-1].split(",") if v.strip()]
    return text.split("|") if "|" in text else text


def _shape(value: Any, annotation: Any) -> Any:
    """A single word where a tuple is wanted stands for a tuple of one, no word for an empty one."""
    wanted = [annotation, *get_args(annotation)]
    is_tuple = any(get_origin(a) in (tuple, list) for a in wanted)
    if value == "" and is_tuple:
        return []
    return [value] if is_tuple and isinstance(value, str | int | float) else value


def _fields(schema: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(schema):
        return {f.name: f.type for f in dataclasses.fields(schema)}
    parameters = inspect.signature(schema).parameters.values()
    return {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY and not p.name.startswith("_")}


def _adapter(schema: Any) -> Any:
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=False, allow_inf_nan=False)
    if dataclasses.is_dataclass(schema):
        dressed: Any = with_config(config)  # typed for classes that pyright knows, not for any dataclass
        return TypeAdapter(dressed(schema))
    signature = inspect.signature(schema).parameters
    knobs: dict[str, Any] = {k: (a, signature[k].default) for k, a in _fields(schema).items()}
    model = create_model(schema.__name__, __config__=config, **knobs)
    return _Model(model)


@dataclasses.dataclass(frozen=True, slots=True)
class _Model:
    model: Any

    def validate_python(self, values: Mapping[str, Any]) -> Any:
        return self.model.model_validate(values)


def _say(error: Any) -> str:
    where = ".".join(str(x) for x in error["loc"]) or "value"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}={error['input']!r}: {message[0].lower()}{message[1:]}" if error["loc"] else message
