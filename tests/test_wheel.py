"""The wheel that users install is complete, and `dsm_jax.convert` imports from it and when editable."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = shutil.ignore_patterns("__pycache__")


def run(*args: str | Path, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Return the wheel built from a copy of the sources: a stale build folder in the checkout must not fill it."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dsm_jax", "convert"):
        shutil.copytree(ROOT / name, source / name, ignore=NOT_SHIPPED)
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", built, source, cwd=source)
    (path,) = built.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(wheel):
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in (("dsm_jax", "dsm_jax"), ("convert", "dsm_jax/convert"))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"dsm_jax/convert/__init__.py", "dsm_jax/py.typed"} <= expected
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert shipped == expected


@pytest.mark.slow
def test_convert_imports_from_an_installed_wheel(wheel, tmp_path):
    site = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); import dsm_jax.convert as module; print(module.__file__)"
    assert run("-I", "-c", code, cwd=tmp_path) == str(site / "dsm_jax/convert/__init__.py")


@pytest.mark.slow
def test_convert_imports_from_an_editable_install(tmp_path):
    code = "import dsm_jax.convert as module; print(module.__file__)"
    assert run("-I", "-c", code, cwd=tmp_path) == str(ROOT / "convert/__init__.py")
