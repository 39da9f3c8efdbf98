"""What travels: the wheel, the samples, the pins, and the targets that install them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # timm brings it, without types
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from PIL import Image

from toolkit.samples import PHOTOS, SAME_PHOTO_PAIRS

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]

#: A clone and a wheel stay small.
SAMPLES_LIMIT_BYTES = 3_000_000


def direct_requirements() -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, lines):
        found[canonicalize_name(requirement.name)] = requirement
    del found[canonicalize_name(PROJECT["name"])]  # an extra that includes another one
    return found


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.partition("==")[::2] for line in lines if line and not line.startswith("#")]
    return dict(pairs)


def conda_dependencies() -> list[Any]:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    dependencies: list[Any] = environment["dependencies"]
    return dependencies


def run_make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Makefile in a folder of its own, as if no make had called the tests."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, folder)  # with its age, which make compares
    inherited = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", "--no-print-directory", "-C", str(folder), *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # From a copy: setuptools packs what an earlier build left in build/.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    no_bytecode = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "toolkit", source / "toolkit", ignore=no_bytecode)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", "dist", "."], cwd=source, check=True, capture_output=True)
    (built,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "toolkit").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }

    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}

    assert packed == expected
    assert "toolkit/py.typed" in packed
    assert "toolkit/samples/photos/CREDITS.txt" in packed


@pytest.mark.slow
def test_wheel_carries_its_license(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]

    text = wheel.read(name).decode()

    assert "Apache License" in text.splitlines()[1]


@pytest.mark.slow
def test_unpacked_wheel_finds_its_samples(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = "from toolkit.samples import PHOTOS; print(PHOTOS, len(list(PHOTOS.glob('*/*.webp'))))"

    shown = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout

    n_photos = len(list(PHOTOS.glob("*/*.webp")))
    assert shown.split() == [str(tmp_path / "toolkit" / "samples" / "photos"), str(n_photos)]


def test_samples_are_small_and_balanced() -> None:
    photos = list(PHOTOS.rglob("*.webp"))

    n_bytes = sum(path.stat().st_size for path in PHOTOS.rglob("*") if path.is_file())
    by_class = {
        folder.name: len(list(folder.iterdir())) for folder in PHOTOS.iterdir() if folder.is_dir()
    }

    assert n_bytes <= SAMPLES_LIMIT_BYTES
    assert sum(by_class.values()) == len(photos)
    assert set(by_class) == {"animals", "fishes", "monuments", "renewable", "tools"}
    assert max(by_class.values()) <= 2 * min(by_class.values())


def test_every_sample_is_free_and_credited() -> None:
    blocks = (PHOTOS / "CREDITS.txt").read_text(encoding="utf-8").strip().split("\n\n")

    licenses, sources = {}, {}
    for block in blocks:
        photo = block.splitlines()[0]
        licenses[photo] = re.search(r"^License: (.+)$", block, re.M)
        sources[photo] = re.search(r"^Source: https://", block, re.M)

    assert sorted(licenses) == sorted(
        str(path.relative_to(PHOTOS)) for path in PHOTOS.rglob("*.webp")
    )
    assert {found and found[1] for found in licenses.values()} == {"CC0-1.0", "Public Domain"}
    assert all(sources.values())


@pytest.mark.parametrize(("small", "large"), SAME_PHOTO_PAIRS)
def test_pairs_are_one_photo_in_two_sizes(small: str, large: str) -> None:
    with Image.open(PHOTOS / small) as one, Image.open(PHOTOS / large) as other:
        sizes = one.size, other.size

    # 320 pixels wide and 1024, cut to the same picture within a pixel of rounding.
    (width, height), (large_width, large_height) = sizes
    assert (width, large_width) == (320, 1024)
    assert abs(large_height * width / large_width - height) <= 1


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    pinned = pins()

    missing = sorted(direct_requirements().keys() - pinned.keys())
    outside = {
        str(requirement): pinned[name]
        for name, requirement in direct_requirements().items()
        if name in pinned and pinned[name] not in requirement.specifier
    }

    assert missing == []
    assert outside == {}


def test_constraints_are_names_and_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()

    odd = [line for line in lines if line and not re.fullmatch(r"# .*|[a-z0-9-]+==[\w.]+", line)]

    assert odd == []
    assert len(pins()) == sum("==" in line for line in lines)  # none is pinned twice


def test_conda_gives_python_and_pip_gives_the_rest() -> None:
    *from_conda, from_pip = conda_dependencies()

    names = [re.split(r"[<>=]", line)[0] for line in from_conda]
    constraints, editable = from_pip["pip"]
    extras = re.fullmatch(r"-e \.\[([a-z,]+)\]", editable)

    assert names == ["python", "pip"]
    assert constraints == "-c constraints.txt"
    assert extras
    assert set(extras[1].split(",")) == EXTRAS.keys() - {"dev"}


def test_conda_python_is_one_that_the_package_allows() -> None:
    python = str(conda_dependencies()[0]).removeprefix("python")

    minor_versions = [f"3.{minor}" for minor in range(30)]
    given = {v for v in minor_versions if v in SpecifierSet(python)}
    allowed = {v for v in minor_versions if v in SpecifierSet(PROJECT["requires-python"])}

    assert given
    assert given <= allowed
    assert min(allowed, key=minor_versions.index) in given


def test_help_explains_every_target(tmp_path: Path) -> None:
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert targets

    shown = run_make(tmp_path)

    explained = {
        line.split()[1] for line in shown.stdout.splitlines() if line.startswith("  make ")
    }
    assert explained == set(targets[1].split())


def test_only_the_first_demo_installs(tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "pip").touch()

    first = run_make(tmp_path, "-n", "demo").stdout.splitlines()
    (tmp_path / ".venv" / ".stamp-demo").touch()
    second = run_make(tmp_path, "-n", "demo").stdout.splitlines()

    assert first[0].endswith('install -c constraints.txt -e ".[demo,fast]"')
    assert first[-1] == ".venv/bin/toolkit demo"
    assert second == [".venv/bin/toolkit demo"]


def test_old_python_is_refused_with_the_cure(tmp_path: Path) -> None:
    # `false` fails the question for the version, as an old Python and a missing one do.
    made = run_make(tmp_path, ".venv/bin/pip", "PYTHON=false")

    assert made.returncode != 0
    assert "false is not Python 3.11 or newer" in made.stderr
    assert "make PYTHON=" in made.stderr


def test_python_without_ensurepip_names_the_package(tmp_path: Path) -> None:
    # What Debian's python3 is without python3-venv: the import fails.
    (tmp_path / "ensurepip.py").write_text("raise ImportError\n")

    made = run_make(tmp_path, ".venv/bin/pip", f"PYTHON={sys.executable}", PYTHONPATH=str(tmp_path))

    assert made.returncode != 0
    assert "apt install python3-venv" in made.stderr
    assert not (tmp_path / ".venv").exists()
