"""What a PT2 archive of a stranger may hold: a program of torch's own operators, plain tensors, and texts.

torch unpickles what an archive holds pickled. It also runs as Python what stands in a program as text: sizes (sympy parses them with eval), names (of which it writes
source), guards, and operators by their path below torch. So every text of a program is held against what such a text can be.

Names are read by torch's own reader, since others may see other entries in the same zip: two lists of contents, or two entries of a name.
"""

import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive import PT2ArchiveReader

from vtzoo.errors import Corrupt
from vtzoo.onnx._quiet import quiet
from vtzoo.refs import shown

_RECORD = re.compile(
    r"models/model\.json|data/weights/(model_weights_config\.json|weight_\d+)|data/constants/(model_constants_config\.json|tensor_\d+)|"
    r"data/sample_inputs/model\.pt|extra/[\w.-]+|\.data/(version|serialization_id)|archive_format|archive_version|version|byteorder",
    re.ASCII,
)  # fmt: skip
_PLAIN = re.compile(r"(weight|tensor)_\d+", re.ASCII)
_WORD = re.compile(r"[\w.+-]*", re.ASCII)
_SYMBOL = re.compile(r"Symbol\('\w+'", re.ASCII)
_SUM = re.compile(r"[\w\s(),=+*/<>-]*", re.ASCII)
_BUILTIN = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|getitem)|math\.(ceil|floor|trunc|sqrt|pow)|"
    r"torch\.sym_(float|int|ite|max|min|not|sqrt|sum)"
)  # fmt: skip
_ATEN = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)", re.ASCII)
_IN_SUMS = frozenset({
    "Symbol", "positive", "nonnegative", "integer", "real", "finite", "Integer", "Rational", "True", "False", "Add", "Mul", "Pow", "Max", "Min", "Mod",
    "PythonMod", "FloorDiv", "CeilDiv", "CleanDiv", "ModularIndexing", "IntTrueDiv", "FloatTrueDiv", "PowByNatural", "FloatPow", "CeilToInt",
    "FloorToInt", "TruncToInt", "TruncToFloat", "RoundToInt", "ToFloat", "Where", "Identity", "LShift", "RShift", "Equality", "Unequality",
    "GreaterThan", "LessThan", "StrictGreaterThan", "StrictLessThan", "And", "Or", "Not",
})  # fmt: skip
_IN_SPECS = frozenset(("type", "builtins.tuple", "builtins.list", "builtins.dict", "context", "null", "children_spec"))


def check_stored(path: Path) -> None:
    """Refuse compressed records, which torch doesn't write: a few bytes could stand for very many.

    Raises:
        Corrupt: says which.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            squeezed = next(
                (i.filename for i in archive.infolist() if i.file_size != i.compress_size or i.compress_type), ""
            )
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise Corrupt(
            f"{path} is no archive that torch can run: {error}", "export it again, or fetch it again"
        ) from error
    if squeezed:
        raise Corrupt(f"{path} holds {shown(squeezed)} compressed, which torch doesn't write", "export it again")


def check_plain(archive: PT2ArchiveReader, path: Path) -> None:
    """Refuse an archive of anything else.

    Raises:
        Corrupt: says what it holds.
    """
    names = archive.get_file_names()
    if len({name.casefold() for name in names}) < len(names):  # torch looks names up without regard to case
        raise _strange(path, "two entries of one name")
    for name in names:
        if not _RECORD.fullmatch(name):
            raise _strange(path, shown(name))
        if name == "models/model.json":
            _check_program(path, json.loads(archive.read_bytes(name)))
        elif name.endswith("_config.json"):
            _check_tensors(path, name, json.loads(archive.read_bytes(name)))
        elif name.endswith("model.pt"):
            _check_inputs(path, name, archive.read_bytes(name))


def _check_program(path: Path, program: Mapping[str, Any]) -> None:
    for key, text in _texts(program, ""):
        if not _KNOWN.get(key, _is_word)(text):
            raise _strange(path, shown(text))


def _texts(value: object, key: str) -> Iterator[tuple[str, str]]:
    """Every text, by the key that it stands under; keys themselves under ""."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for part in value:  # type: ignore[reportUnknownVariableType]
            yield from _texts(part, key)
    elif isinstance(value, dict):
        for name, part in value.items():  # type: ignore[reportUnknownVariableType]
            yield "", str(name)
            yield from _texts(part, str(name))


def _is_word(text: str) -> bool:
    return _WORD.fullmatch(text) is not None


def _is_sum(text: str) -> bool:
    """What torch writes of a size: sympy's own classes, symbols and whole numbers."""
    rest = _SYMBOL.sub("Symbol(", text)
    return _SUM.fullmatch(rest) is not None and _IN_SUMS.issuperset(re.findall(r"[A-Za-z_]\w*", rest))


def _is_spec(text: str) -> bool:
    """How arguments nest; other types could import a module."""
    return _IN_SPECS.issuperset(re.findall(r"[A-Za-z_.\\]+", text))


def _is_operator(text: str) -> bool:
    """Of aten, and no reader or writer of files, or one that sizes are counted with."""
    found = _ATEN.fullmatch(text)
    if found is None:
        return _BUILTIN.fullmatch(text) is not None
    made: Any = getattr(getattr(torch.ops.aten, found[1], None), found[2], None)
    return isinstance(made, torch._ops.OpOverload) and all(a.name != "filename" for a in made._schema.arguments)  # noqa: SLF001 - nothing public tells


def _is_any(_text: str) -> bool:
    return True


_KNOWN: Mapping[str, Callable[[str], bool]] = {
    "expr_str": _is_sum, "in_spec": _is_spec, "out_spec": _is_spec, "target": _is_operator,
    # notes that torch keeps as texts, guards, which are not run here, and arguments such as the equation of an einsum
    **dict.fromkeys(("nn_module_stack", "torch_fn", "source_fn_stack", "stack_trace", "custom", "from_node", "guards_code", "as_string"), _is_any),
}  # fmt: skip


def _check_tensors(path: Path, name: str, config: Mapping[str, Any]) -> None:
    for payload in config["config"].values():
        if payload["use_pickle"] is not False or not _PLAIN.fullmatch(str(payload["path_name"])):
            raise _strange(path, name)


def _check_inputs(path: Path, name: str, content: bytes) -> None:
    """torch tries to read these as plain tensors, and unpickles what is none."""
    try:
        with quiet():
            torch.load(io.BytesIO(content), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise _strange(path, name) from error


def _strange(path: Path, what: str) -> Corrupt:
    said = "holds something else than a program and plain tensors, which could run anything when loaded"
    return Corrupt(f"{path} {said}: {what}", "use a file that vtzoo export pt2 wrote, with a recent torch")
