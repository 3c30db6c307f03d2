"""Break each method on purpose, one way at a time, and see that a test notices.

    python scripts/mutate.py [METHOD …] [--kinds sign,scale,dead,lost,moved,swap] [--most 1] [--part 0/2]

Of every method's file up to six mutants are made, in a copy of the checkout:

    sign     the first sum in what the graft computes becomes a difference, or the other way round
    scale    the first product loses its shorter factor
    dead     what the graft computes is thrown away
    lost     the last site is left out; a method of the head alone gets one
    moved    it acts at MLPs instead of attentions, or of all layers, or the other way round
    swap     the worst is chosen instead of the best

and the contract and parity tests that name the method are run on it until the first fails. Printed are all mutants with what
became of them; the exit code is 1 when one survives. A file that has nothing to break in a way has no such mutant.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vtzoo import registry  # noqa: E402 - the root must be on the path first

KINDS = ("sign", "scale", "dead", "lost", "moved", "swap")
COPIED = (
    "vtzoo",
    "cli",
    "tests",
    "scripts",
    "benchmarks",
    "docs",
    "pyproject.toml",
    "zoo_index.yaml",
    "README.md",
    "CHANGELOG.md",
)
TESTS = (  # the quickest to find what is wrong first
    ("tests/parity", "tests/contract/test_places.py"),
    ("tests/contract/test_counts.py", "tests/contract/test_methods.py", "tests/unit"),
)
ACTS = ("leave", "enter", "increment", "read", "head", "fold")  # by which of these a graft acts, the first found counts


def mutants(text: str) -> Iterator[tuple[str, str, str]]:
    """(kind, what was changed, the mutated text) for every kind that a file offers."""
    changes = {"sign": _sign, "scale": _scale, "dead": _dead, "lost": _lost, "moved": _moved, "swap": _swap}
    for kind, change in changes.items():
        tree = ast.parse(text)
        if (told := change(tree)) is not None:
            yield kind, told, ast.unparse(ast.fix_missing_locations(tree))


def _acting(tree: ast.Module) -> list[ast.FunctionDef]:
    """The functions in which the maths stands: those of the classes but their construction, then the module's."""
    skip = ("__init__", "__post_init__", "start", "bind", "release", "sites", "share")
    inside = [f for c in tree.body if isinstance(c, ast.ClassDef) for f in c.body if isinstance(f, ast.FunctionDef)]
    outside = [f for f in tree.body if isinstance(f, ast.FunctionDef)]
    found = [f for f in [*inside, *outside] if f.name not in skip]
    order = {name: i for i, name in enumerate(ACTS)}
    return sorted(found, key=lambda f: order.get(f.name, len(order)))


def _products(tree: ast.Module, kinds: tuple[type, ...]) -> Iterator[ast.BinOp]:
    """Sums or products of tensors, not of sizes and places."""
    for function in _acting(tree):
        sizes = {id(n) for s in ast.walk(function) if isinstance(s, ast.Subscript) for n in ast.walk(s.slice)}
        for node in ast.walk(function):
            if (
                isinstance(node, ast.BinOp)
                and isinstance(node.op, kinds)
                and id(node) not in sizes
                and not _counts(node)
            ):
                yield node


def _counts(node: ast.BinOp) -> bool:
    """Whether it reckons with sizes, or joins lists or names."""
    sides = (node.left, node.right)
    whole = any(
        isinstance(s, ast.List) or (isinstance(s, ast.Constant) and isinstance(s.value, int | str)) for s in sides
    )
    return whole or any(word in ast.unparse(node) for word in (".shape", "len(", ".seen", ".ndim", "prod("))


def _sums(tree: ast.Module) -> ast.Call | None:
    """The first `plus(y, h, B, scale)`, which is y + scale * B h."""
    calls = (n for f in _acting(tree) for n in ast.walk(f) if isinstance(n, ast.Call))
    return next((n for n in calls if ast.unparse(n.func) == "plus" and len(n.args) == 4), None)


def _sign(tree: ast.Module) -> str | None:
    if (call := _sums(tree)) is not None:
        before = ast.unparse(call)
        call.args[3] = ast.UnaryOp(ast.USub(), call.args[3])
        return f"{before} -> {ast.unparse(call)}"
    node = next(_products(tree, (ast.Add, ast.Sub)), None)
    if node is None:
        return None
    before = ast.unparse(node)
    node.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
    return f"{before} -> {ast.unparse(node)}"


def _scale(tree: ast.Module) -> str | None:
    if (call := _sums(tree)) is not None:
        return f"{ast.unparse(call)} -> without {ast.unparse(call.args.pop())}"
    node = next(_products(tree, (ast.Mult,)), None)
    if node is None:
        return None
    before = ast.unparse(node)
    long, short = sorted((node.left, node.right), key=_factor)
    parent = next(p for p in ast.walk(tree) for child in ast.iter_child_nodes(p) if child is node)
    for field, value in ast.iter_fields(parent):
        if value is node:
            setattr(parent, field, long)
        elif isinstance(value, list) and any(v is node for v in value):
            setattr(parent, field, [long if v is node else v for v in value])
    return f"{before} -> without {ast.unparse(short)}"


def _factor(side: ast.expr) -> tuple[bool, bool, int]:
    """What is kept comes first: what flows through (a bare name), not a number of the graft's own, then the longer side."""
    text = ast.unparse(side)
    own = isinstance(side, ast.Attribute) or "scale" in text.partition("(")[0]
    return own, not isinstance(side, ast.Name), -len(text)


def _dead(tree: ast.Module) -> str | None:
    grafts = [c for c in tree.body if isinstance(c, ast.ClassDef) and c.name == "Graft"]
    functions = {f.name: f for c in grafts for f in c.body if isinstance(f, ast.FunctionDef)}
    functions |= {f.name: f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == "head"}
    idle = {
        "leave": "return y",
        "enter": "return x",
        "read": "return before[name]",
        "head": "return None",
        "increment": "return 0 * self._dead()",
    }
    name = next((n for n in ACTS if n in functions and n in idle), None)
    if name is None:
        return None
    if name == "increment":  # of the right shape, and still a function of the parameters
        lost = functions[name]
        kept = ast.parse(ast.unparse(lost)).body[0]
        assert isinstance(kept, ast.FunctionDef)
        kept.name = "_dead"
        grafts[0].body.append(kept)
    functions[name].body = ast.parse(idle[name]).body
    for other in ("read",) if name == "leave" else ():
        if other in functions:
            functions[other].body = ast.parse(idle[other]).body
    return f"{name} does nothing"


def _lost(tree: ast.Module) -> str | None:
    sites = next((f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == "sites"), None)
    returns = [n for n in ast.walk(sites) if isinstance(n, ast.Return) and n.value is not None] if sites else []
    if not returns:
        return None
    if ast.unparse(returns[-1].value or ast.Constant(None)) == "()":
        returns[-1].value = ast.parse("anatomy.linears[:1]", mode="eval").body
        return "the first linear is a site"
    for node in returns:
        assert node.value is not None
        node.value = ast.parse(f"list({ast.unparse(node.value)})[:-1]", mode="eval").body
    return "the last site is left out"


def _moved(tree: ast.Module) -> str | None:
    """The first of: a name for parts of a block, and the default of `targets`."""
    other = {"ATTENTION": "MLP", "MLP": "ATTENTION"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in other:
            node.id = other[before := node.id]
            return f"{before} -> {node.id}"
        if isinstance(node, ast.Tuple) and [ast.unparse(e) for e in node.elts] == ["'auto'"]:
            node.elts = [ast.Constant("mlp")]
            return "targets auto -> mlp"
    return None


def _swap(tree: ast.Module) -> str | None:
    for node in ast.walk(tree):
        chooses = isinstance(node, ast.Call) and any(k.arg == "key" for k in node.keywords)
        if chooses and isinstance(node.func, ast.Name) and node.func.id in ("max", "min"):
            before = ast.unparse(node)
            node.func.id = "min" if node.func.id == "max" else "max"
            return f"{before} -> {ast.unparse(node)}"
    return None


def survives(folder: Path, method: str, text: str) -> bool:
    """Whether all tests of a method pass on a mutant."""
    target = folder / Path(registry.card("methods", method).path).relative_to(ROOT)
    kept = target.read_text(encoding="utf-8")
    target.write_text(text, encoding="utf-8")
    words = " or ".join({method, method.replace("-", "_")})
    options = ("-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "-k", words)
    try:
        return all(_passes(folder, [*options, *tests]) for tests in TESTS)
    finally:
        target.write_text(kept, encoding="utf-8")


def _passes(folder: Path, arguments: Sequence[str]) -> bool:
    command = [sys.executable, "-m", "pytest", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    return done.returncode in (0, 5)  # 5: no test names it


def main() -> int:
    """Make the mutants, and say which survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument(
        "--most", type=int, default=len(KINDS), metavar="N", help="mutants of each file, the first N kinds it has"
    )
    parser.add_argument("--part", default="0/1")
    asked = parser.parse_args()
    part, _, parts = asked.part.partition("/")
    names = [m for i, m in enumerate(asked.methods or registry.names("methods")) if i % int(parts) == int(part)]
    alive, count = 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for item in COPIED:
            copy: Callable[..., object] = shutil.copytree if (ROOT / item).is_dir() else shutil.copy
            copy(ROOT / item, folder / item)
        for method in names:
            text = Path(registry.card("methods", method).path).read_text(encoding="utf-8")
            chosen = [m for m in mutants(text) if m[0] in asked.kinds.split(",")]
            for kind, told, mutant in chosen[: asked.most]:
                lives = survives(folder, method, mutant)
                alive, count = alive + lives, count + 1
                print(f"{method} | {kind} | {told} | {'SURVIVES' if lives else 'killed'}", flush=True)
    print(f"{count} mutants, {alive} survivors")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main())
