"""The shape of the source tree: who may import whom, nothing in a circle, what `import dsm_jax` brings along."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsm_jax

ROOT = Path(__file__).resolve().parents[1]
LEVELS = (
    ("errors", "garbage", "malloc", "progress", "process", "files", "options", "configs"),
    ("streaming", "headers", "decoding", "audio", "hub", "tokenizers"),
    ("nn", "sharding"),
    ("models",),
    ("convert",),
    ("checkpoints",),
    ("runtime",),
    ("microphone", "codec", "speaking", "speech"),
    ("stt", "tts", "csm"),
    ("synthesis",),
    ("benchmark", "evaluation", "serving", "training"),
    ("tasks", "cli", "__main__"),
    ("dsm_jax",),
)
RANK = {part: rank for rank, parts in enumerate(LEVELS) for part in parts}
OUTSIDE = ("tests", "examples", "recipes")  # what the library never imports
CLAUSES = ("what", "whatever", "how", "which", "whichever", "where", "whether", "when", "who", "whose", "why")
THIRD = re.compile(r"[A-Z][a-z]+[a-rt-z]s")  # "Reads", "Words": a verb of the third person, or a noun
RESOLVERS = ("import_module", "resolve_name")  # functions that import what a text names


def sources(root: Path, *folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(path: Path, *, running: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line, full name) for every import at any depth; a relative name keeps its leading dots.

    Args:
      path: of a module.
      running: leave out the imports of type checkers, which never run.
    """
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        skipped = isinstance(node, ast.If) and running and _is_type_checking(node)
        waiting += node.orelse if skipped else ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in RESOLVERS:
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            yield from ((node.lineno, text.replace(":", ".")) for text in texts)


def part_of(dotted: str) -> str:
    """Name the ranked part that `dsm_jax.part.rest` belongs to; the package itself for its public names."""
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
            if name.split(".")[0] in OUTSIDE:
                faults.append(f"{place}:{line}: the library imports {name}, which is not part of it")
            if name.split(".")[0] == "dsm_jax" and RANK[part_of(name)] > RANK[part]:
                faults.append(f"{place}:{line}: {part} (rank {RANK[part]}) imports {name} (rank {RANK[part_of(name)]})")
    return faults


def ghost_faults(root: Path) -> list[str]:
    """Return ranks of parts that do not exist."""
    there = {path.stem for path in (root / "dsm_jax").iterdir()} | {"convert", "dsm_jax"}
    return [f"{part} has a rank and does not exist; take it out of LEVELS" for part in sorted(RANK.keys() - there)]


def module_of(place: Path) -> str:
    """Return the dotted name of a file of the library, by its place in the checkout."""
    parts = place.with_suffix("").parts
    parts = ("dsm_jax", *parts) if parts[0] == "convert" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circle_faults(root: Path) -> list[str]:
    """Return modules that import each other, imports inside functions included.

    That a module's own packages are imported before it does not count: a package counts where a name is taken from it.
    """
    modules = {module_of(path.relative_to(root)): path for path in sources(root, "dsm_jax", "convert")}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = [name for _, name in imports(path, running=True)]
        targets = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = targets & modules.keys()
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["in a circle: " + " imports ".join(reversed(error.args[1]))]
    return []


def naming_faults(root: Path) -> list[str]:
    """Relative imports, and `convert` by its folder's name, which exists only in a checkout."""
    return [
        f"{path.relative_to(root)}:{line}: {name}; write the full name, dsm_jax.…"
        for path in sources(root, "dsm_jax", "convert", "tests", "examples", "recipes")
        for line, name in imports(path)
        if name.startswith(".") or name.split(".")[0] == "convert"
    ]


def prose_faults(root: Path) -> list[str]:
    """Return docstrings that open with a clause in place of a verb and its object, or a noun.

    A function's docstring opens with a verb in the imperative. A property's may be a noun, and so may a test's, whose
    docstring adds to its name.
    """
    faults = []
    for path in sources(root, "dsm_jax", "convert", "recipes", "examples", "tests"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = (ast.get_docstring(node) or "").split(maxsplit=1)[:1]
                if first and (first[0].rstrip(",").lower() in CLAUSES or (_acts(node) and THIRD.fullmatch(first[0]))):
                    faults.append(f"{path.relative_to(root)}: a docstring opens with {first[0]}; begin with a verb")
    return faults


def _acts(node: ast.AST) -> bool:
    """Tell whether a docstring belongs to a function that is neither a property, nor a fixture, nor a test."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("test_"):
        return False
    return not any("property" in (said := ast.unparse(one)) or "fixture" in said for one in node.decorator_list)


def citation_faults(root: Path) -> list[str]:
    """Return the tests and the files that a page names and that do not exist."""
    faults = []
    for page in [*root.glob("*.md"), *(root / "docs").rglob("*.md"), *(root / "recipes").rglob("*.md")]:
        named = re.findall(r"`((?:dsm_jax|convert|tests|docs|examples)/[\w/.-]+)[`:]", page.read_text(encoding="utf-8"))
        missing = [place for place in named if not (root / place).exists()]
        faults += [f"{page.relative_to(root)}: there is no {place}; name what exists" for place in missing]
        for place, name in re.findall(r"`((?:tests|recipes)/[\w/.]+\.py)::(\w+)", page.read_text(encoding="utf-8")):
            file = root / place
            if not file.is_file() or f"def {name}(" not in file.read_text(encoding="utf-8"):
                faults.append(f"{page.relative_to(root)}: there is no test {place}::{name}; name one that exists")
    return faults


def plant(root: Path, place: str, text: str) -> None:
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    "faults", [layering_faults, ghost_faults, circle_faults, naming_faults, prose_faults, citation_faults]
)
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
        ("dsm_jax/audio.py", "import dsm_jax.cli\n", "audio.py:1: audio (rank 1) imports dsm_jax.cli (rank 11)"),
        ("dsm_jax/audio.py", "from dsm_jax import nn\n", "imports dsm_jax.nn (rank 2)"),
        ("dsm_jax/cli.py", "from dsm_jax import load\n", "cli (rank 11) imports dsm_jax.load (rank 12)"),
        ("convert/rules.py", "from dsm_jax.stt import words\n", "rules.py:1: convert (rank 4) imports"),
        ("convert/rules.py", "def f():\n    from dsm_jax import checkpoints\n", "imports dsm_jax.checkpoints (rank 5)"),
        ("dsm_jax/nn/a.py", "import importlib\nimportlib.import_module('dsm_jax.stt.words')\n", "nn (rank 2) imports"),
        (
            "dsm_jax/nn/a.py",
            "from pkgutil import resolve_name\nresolve_name('dsm_jax.stt:x')\n",
            "imports dsm_jax.stt.x",
        ),
        ("dsm_jax/stt/a.py", "from recipes.digits import data\n", "the library imports recipes.digits.data, which is"),
        ("dsm_jax/utils.py", "", "utils.py: utils has no rank"),
        ("dsm_jax/utils/a.py", "", "utils/a.py: utils has no rank"),
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


def test_a_rank_of_nothing_is_caught(tmp_path):
    for part in RANK.keys() - {"hub", "convert", "dsm_jax"}:
        plant(tmp_path, f"dsm_jax/{part}.py", "")
    assert ghost_faults(tmp_path) == ["hub has a rank and does not exist; take it out of LEVELS"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("import dsm_jax.nn.b\n", "import dsm_jax.nn.a\n"),
        ("from dsm_jax.nn import b\n", "def f():\n    from dsm_jax.nn.a import g\n"),
        ("def f():\n    from dsm_jax.nn.b import g\n", "class C:\n    def f(self):\n        import dsm_jax.nn.a\n"),
        ("import importlib\nimportlib.import_module('dsm_jax.nn.b')\n", "from dsm_jax.nn.a import f\n"),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import dsm_jax.nn.b\n", "from dsm_jax.nn.a import f\n"),
    ],
)
def test_a_circle_is_caught(tmp_path, first, second):
    plant(tmp_path, "dsm_jax/nn/a.py", first)
    plant(tmp_path, "dsm_jax/nn/b.py", second)
    (found,) = circle_faults(tmp_path)
    assert found in (
        "in a circle: dsm_jax.nn.a imports dsm_jax.nn.b imports dsm_jax.nn.a",
        "in a circle: dsm_jax.nn.b imports dsm_jax.nn.a imports dsm_jax.nn.b",
    )


def test_a_circle_through_a_package_and_the_folder_of_conversion_is_caught(tmp_path):
    plant(tmp_path, "convert/__init__.py", "from dsm_jax.convert.rules import f\n")
    plant(tmp_path, "convert/rules.py", "def f():\n    from dsm_jax.convert import g\n")
    (found,) = circle_faults(tmp_path)
    assert "dsm_jax.convert imports dsm_jax.convert.rules" in found


def test_what_only_a_type_checker_imports_is_no_circle(tmp_path):
    plant(tmp_path, "dsm_jax/nn/a.py", "if TYPE_CHECKING:\n    from dsm_jax.nn.b import f\n")
    plant(tmp_path, "dsm_jax/nn/b.py", "from dsm_jax.nn.a import g\n")
    assert circle_faults(tmp_path) == []


@pytest.mark.parametrize("text", ["from . import conv\n", "from ..nn import conv\n", "from convert import rules\n"])
def test_a_relative_import_is_caught(tmp_path, text):
    plant(tmp_path, "dsm_jax/nn/conv.py", text)
    assert len(naming_faults(tmp_path)) == 1


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys; before = set(sys.modules); import dsm_jax; print(*sorted(set(sys.modules) - before))"
    added = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "dsm_jax" in added.split()
    assert {name for name in added.split() if name.split(".")[0] not in sys.stdlib_module_names} == {"dsm_jax"}


def test_the_pages_have_the_ranks_of_this_test():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", page, re.MULTILINE)
    ranks = {name: int(rank) for rank, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert ranks == {name: rank for name, rank in RANK.items() if name not in ("__main__", "dsm_jax")}
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    floors = [re.findall(r"`(\w+)`", names) for names in re.findall(r"^\| \d+ \| (.*?) \|", page, re.MULTILINE)]
    assert {name for floor in floors for name in floor} == ranks.keys()
    highest = [max(RANK[name] for name in floor) for floor in floors]
    lowest = [min(RANK[name] for name in floor) for floor in floors]
    assert all(high < low for high, low in zip(highest, lowest[1:], strict=False))


@pytest.mark.parametrize("name", [*dsm_jax.__all__, "__version__"])
def test_every_public_name_resolves_and_is_listed(name):
    assert getattr(dsm_jax, name) is not None
    assert name in dir(dsm_jax)


@pytest.mark.parametrize("name", [*dsm_jax._MODULES, "convert.layouts"])
def test_a_module_with_names_for_users_needs_no_import_of_its_own(name):
    code = f"import dsm_jax; dsm_jax.convert; import dsm_jax.convert.layouts; print(dsm_jax.{name}.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"dsm_jax.{name}\n"


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


def test_a_docstring_that_opens_with_a_clause_is_found(tmp_path):
    plant(tmp_path, "dsm_jax/a.py", '"""Read."""\n\n\nclass A:\n    """What is read."""\n')
    plant(tmp_path, "dsm_jax/b.py", '"""Tell what is read."""\n\n\ndef _read():\n    """Reads a file."""\n')
    plant(
        tmp_path, "dsm_jax/c.py", 'class C:\n    @property\n    def seconds(self):\n        """Seconds of sound."""\n'
    )
    assert sorted(prose_faults(tmp_path)) == [
        "dsm_jax/a.py: a docstring opens with What; begin with a verb",
        "dsm_jax/b.py: a docstring opens with Reads; begin with a verb",
    ]


def test_a_test_that_a_page_names_in_vain_is_found(tmp_path):
    plant(tmp_path, "tests/test_a.py", "def test_there():\n    pass\n")
    plant(
        tmp_path,
        "docs/page.md",
        "`tests/test_a.py::test_there`, `tests/test_a.py::test_gone`, `dsm_jax/nn`, `docs/page.md`",
    )
    assert citation_faults(tmp_path) == [
        "docs/page.md: there is no dsm_jax/nn; name what exists",
        "docs/page.md: there is no test tests/test_a.py::test_gone; name one that exists",
    ]
