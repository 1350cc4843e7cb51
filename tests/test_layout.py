"""The shape of the source tree: who may import whom, how long a module is, what `import dsm_jax` brings along."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsm_jax

ROOT = Path(__file__).resolve().parents[1]
LEVELS = (
    ("configs", "errors", "presets", "strict"),
    ("streaming", "audio", "tokenizers"),
    ("nn",),
    ("models",),
    ("checkpoints", "convert"),
    ("codec", "stt", "tts"),
    ("benchmark", "training", "serving", "evaluate"),
    ("arguments", "cli", "malloc", "tasks", "terminal"),
    ("dsm_jax",),
)
RANK = {part: rank for rank, parts in enumerate(LEVELS) for part in parts}
MAX_LINES = 400


def sources(root: Path, *folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, full name) for every import at any depth; a relative name keeps its leading dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def part_of(dotted: str) -> str:
    """Names the ranked part that `dsm_jax.part.rest` belongs to; the package itself for its public names."""
    second = dotted.partition(".")[2].partition(".")[0]
    return second if second in RANK else "dsm_jax"


def layering_faults(root: Path) -> list[str]:
    faults = []
    for path in sources(root, "dsm_jax", "convert"):
        place = path.relative_to(root)
        part = place.with_suffix("").parts[0 if place.parts[0] == "convert" else 1]
        part = "dsm_jax" if part == "__init__" else part
        if part not in RANK:
            faults.append(f"{place}: {part} has no rank; give it one in LEVELS")
            continue
        for line, name in imports(path):
            if name.split(".")[0] == "dsm_jax" and RANK[part_of(name)] > RANK[part]:
                faults.append(f"{place}:{line}: {part} (rank {RANK[part]}) imports {name} (rank {RANK[part_of(name)]})")
    return faults


def naming_faults(root: Path) -> list[str]:
    """Relative imports, and `convert` by its folder's name, which exists only in a checkout."""
    return [
        f"{path.relative_to(root)}:{line}: {name}; write the full name, dsm_jax.…"
        for path in sources(root, "dsm_jax", "convert", "tests", "examples", "recipes")
        for line, name in imports(path)
        if name.startswith(".") or name.split(".")[0] == "convert"
    ]


def recipe_faults(root: Path) -> list[str]:
    """Lists imports of a recipe by the library, its tests apart from the benchmarks, or its examples."""
    return [
        f"{path.relative_to(root)}:{line}: {name}; recipes stand on the library, which knows none of them"
        for path in sources(root, "dsm_jax", "convert", "tests", "examples")
        for line, name in imports(path)
        if name.split(".")[0] == "recipes" and "benchmarks" not in path.parts
    ]


def length_faults(root: Path) -> list[str]:
    lengths = {
        path.relative_to(root): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources(root, "dsm_jax", "convert", "tests", "examples", "recipes")
    }
    return [f"{place}: {lines} lines, more than {MAX_LINES}" for place, lines in lengths.items() if lines > MAX_LINES]


def plant(root: Path, place: str, text: str) -> None:
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("faults", [layering_faults, naming_faults, recipe_faults, length_faults])
def test_the_tree_has_no_fault(faults):
    assert faults(ROOT) == []


def test_the_tree_is_where_the_checkers_look():
    assert {"dsm_jax/errors.py", "convert/__init__.py"} <= {
        str(path.relative_to(ROOT)) for path in sources(ROOT, "dsm_jax", "convert")
    }


@pytest.mark.parametrize(
    ("place", "text", "fault"),
    [
        ("dsm_jax/nn/conv.py", "def f():\n    from dsm_jax.models import lm\n", "nn/conv.py:2: nn (rank 2) imports"),
        ("dsm_jax/audio.py", "import dsm_jax.cli\n", "audio.py:1: audio (rank 1) imports dsm_jax.cli (rank 7)"),
        ("dsm_jax/audio.py", "from dsm_jax import nn\n", "imports dsm_jax.nn (rank 2)"),
        ("dsm_jax/cli.py", "from dsm_jax import load\n", "cli (rank 7) imports dsm_jax.load (rank 8)"),
        ("convert/rules.py", "from dsm_jax.stt import words\n", "rules.py:1: convert (rank 4) imports"),
        ("dsm_jax/utils.py", "", "utils.py: utils has no rank"),
    ],
)
def test_an_upward_import_is_caught(tmp_path, place, text, fault):
    plant(tmp_path, place, text)
    (found,) = layering_faults(tmp_path)
    assert fault in found


def test_a_downward_or_level_import_is_allowed(tmp_path):
    plant(tmp_path, "dsm_jax/models/lm.py", "from dsm_jax import nn, streaming\nimport dsm_jax.models.mimi\n")
    plant(tmp_path, "dsm_jax/__init__.py", "from dsm_jax.cli import main\n")
    assert layering_faults(tmp_path) == []


@pytest.mark.parametrize("text", ["from . import conv\n", "from ..nn import conv\n", "from convert import rules\n"])
def test_a_relative_import_is_caught(tmp_path, text):
    plant(tmp_path, "dsm_jax/nn/conv.py", text)
    assert len(naming_faults(tmp_path)) == 1


@pytest.mark.parametrize("text", ["from recipes.digits import data\n", "def f():\n    import recipes.digits.stt\n"])
def test_an_import_of_a_recipe_is_caught(tmp_path, text):
    plant(tmp_path, "dsm_jax/training/loop.py", text)
    plant(tmp_path, "tests/benchmarks/training.py", text)  # the benchmarks time the recipe's networks
    (fault,) = recipe_faults(tmp_path)
    assert "loop.py" in fault


def test_a_long_module_is_caught(tmp_path):
    plant(tmp_path, "dsm_jax/short.py", "pass\n" * MAX_LINES)
    plant(tmp_path, "dsm_jax/long.py", "pass\n" * (MAX_LINES + 1))
    assert length_faults(tmp_path) == ["dsm_jax/long.py: 401 lines, more than 400"]


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys; before = set(sys.modules); import dsm_jax; print(*sorted(set(sys.modules) - before))"
    added = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "dsm_jax" in added.split()
    assert {name for name in added.split() if name.split(".")[0] not in sys.stdlib_module_names} == {"dsm_jax"}


@pytest.mark.parametrize("name", [*dsm_jax.__all__, "__version__"])
def test_every_public_name_resolves_and_is_listed(name):
    assert getattr(dsm_jax, name) is not None
    assert name in dir(dsm_jax)


def test_type_checkers_see_the_names_that_run():
    seen = {
        name.rpartition(".")[2]: name.rpartition(".")[0]
        for _, name in imports(ROOT / "dsm_jax/__init__.py")
        if name.startswith("dsm_jax.")
    }
    assert seen == dsm_jax._MODULE_OF
    assert sorted(seen) == dsm_jax.__all__


def test_an_unknown_name_is_an_ordinary_error():
    with pytest.raises(AttributeError, match=r"^module 'dsm_jax' has no attribute 'nosuch'$"):
        _ = dsm_jax.nosuch
    with pytest.raises(ImportError, match="cannot import name 'nosuch' from 'dsm_jax'"):
        exec("from dsm_jax import nosuch")
