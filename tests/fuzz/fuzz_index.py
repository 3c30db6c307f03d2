"""Fuzz what is read of texts: an index, a recipe, names, refs, digests, members. Not part of the tests; needs atheris, which has no place in `dev`.

    python -m venv fuzz && fuzz/bin/pip install atheris pyyaml pydantic
    PYTHONPATH=. fuzz/bin/python tests/fuzz/fuzz_index.py corpus-index -max_total_time=1800 -rss_limit_mb=300

Whatever the bytes: an index that can be written and read again and says the same, or a refusal in two lines; below 300 MB.
"""

import sys
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vtzoo", "yaml"]):
    from vtzoo import catalogue, refs, yaml_file
    from vtzoo.errors import VtzooError

WHERE = Path("zoo_index.yaml")
DIGEST = "ab" * 32
SEEDS = (
    "schema: 1\n",
    f"schema: 1\nbackbones:\n  vit:\n    arch: test_vit\n    source: object:sha256:{DIGEST}\n    input_size: [3, 8, 8]\n    mean: [0.5, .5, 1e-1]\n",
    f"schema: 1\ndeltas:\n  a/b: {{digest: {DIGEST}, size_bytes: 12, tasks: [a], metrics: {{top1: .nan}}, signature: 'sha256:{DIGEST}'}}\n",
    f"catalogue: true\nschema: 1\nmodels:\n  m: {{files: {{config.json: {DIGEST}, model.safetensors: {DIGEST}}}, kind: export}}\n",
    "a: &x {p: 1, q: 0x1f}\nb: {<<: *x, q: 2001-01-01}\nc: [on, off, ~, 1:20]\n",
)
CHECKS = (refs.check_name, refs.check_digest, refs.check_member, refs.check_section)


def one(data: bytes) -> None:
    """Read bytes as an index, and as each of the shorter texts."""
    text = data.decode("utf-8", "surrogateescape")
    with suppress(VtzooError):
        index = catalogue.parse(data, WHERE)
        with suppress(VtzooError):  # what is read may be more than is written
            text_of = catalogue.dump(index)
            assert catalogue.dump(catalogue.parse(text_of.encode(), WHERE)) == text_of
        for section, table in index.sections.items():
            for name, facts in table.items():
                assert all(len(d) == 64 for d in refs.Entry(section, name, facts).objects)
    with suppress(VtzooError):
        yaml_file.mapping(text, "f.yaml", "hint")
    for check in CHECKS:
        with suppress(VtzooError):
            check(text)
    with suppress(VtzooError):
        refs.resolve(text, [refs.Entry("deltas", "a/b", {"digest": DIGEST})])


def main() -> None:
    """Write seeds into the corpus folder, and go."""
    folder = next((Path(a) for a in sys.argv[1:] if not a.startswith("-")), None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for i, text in enumerate(SEEDS):
            (folder / f"seed-{i}").write_text(text, encoding="utf-8")
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
