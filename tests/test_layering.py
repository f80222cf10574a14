"""The shape of the package, read from its syntax trees: who may import whom, and what every file and function owes its reader.

Imports point down: entry points, then the families of methods, then the core. Three libraries have one door each: linen under
models/, jax.sharding in sharding.py, Orbax in storage/checkpoint.py.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxpost"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]

# Families are folders of methods that do not know of each other; data and sampling serve them all.
FAMILIES = ("objectives", "rollouts", "rewards", "adapters", "merging", "evals", "tasks", "annotators", "synthesis")
# An annotator writes down what objectives compute, a task has a reward, and an eval has completions judged.
KNOWN_TO = {
    "annotators": ("annotators", "objectives"),
    "tasks": ("tasks", "rewards"),
    "evals": ("evals", "objectives", "rollouts"),
}
SERVICES = ("data", "sampling", "models")
CORE = ("config", "storage", "reporting")
ENTRY_POINTS = ("train", "api", "annotate", "generate", "evaluate", "export", "merge", "fit", "report", "study", "studies")
# What runs or compiles whole stages.
WHOLE_STAGES = ("compiled/program",)
# One page of what is looked up there: a zoo.
LONG = {"models/families.py": 700}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, at its top or inside a function; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide which layer they go to"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def under(name: str, *prefixes: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def attributes(path: Path) -> set[str]:
    """Dotted attributes that a file uses, such as jax.sharding.Mesh."""
    return {ast.unparse(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}


DOORS = {
    "flax.linen": lambda name: name.startswith("models/"),
    "jax.sharding": lambda name: name == "sharding.py",
    "orbax": lambda name: name == "storage/checkpoint.py",
}


@pytest.mark.parametrize("library", DOORS)
def test_a_library_has_one_door(library):
    users = {
        n for n, path in zip(NAMES, FILES, strict=True) if any(under(i, library) for i in imported(path) | attributes(path))
    }
    assert users and all(DOORS[library](name) for name in users), users


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_down(name):
    path, parts = PACKAGE / name, name.split("/")
    own = {i for i in imported(path) if under(i, "jaxpost")}
    above = [f"jaxpost.{e}" for e in ENTRY_POINTS] + ["jaxpost.stages"]
    families = [f"jaxpost.{f}" for f in FAMILIES]
    if parts[0] in FAMILIES:
        known = [f"jaxpost.{f}" for f in KNOWN_TO.get(parts[0], parts[:1])]
        assert not [i for i in own if under(i, *[f for f in families if f not in known])]
    elif parts[0] in (*SERVICES, *CORE) or (len(parts) == 1 and name.removesuffix(".py") not in ENTRY_POINTS):
        assert not [i for i in own if under(i, *families)]
    if name.removesuffix(".py") not in (*ENTRY_POINTS, *WHOLE_STAGES) and parts[0] not in ("stages", "studies"):
        known = ["jaxpost.stages.tasks"] if parts[0] == "evals" else []  # which opens a task for whoever asks its problems
        assert not [i for i in own if under(i, *above) and not under(i, *known)]
    assert not [i for i in imported(path) if under(i, "configs", "tests", "torch")]


def test_recipes_know_only_the_recipe():
    """But for papers, which bring their methods (test_papers.py)."""
    for path in sorted(path for path in (ROOT / "configs").rglob("*.py") if "\nSTUDY = " not in path.read_text()):
        assert {i for i in imported(path) if under(i, "jaxpost")} <= {"jaxpost.recipe"}, path
        assert sum(bool(line.strip()) for line in path.read_text().splitlines()) <= 60, path
        assert "--config=" in (ast.get_docstring(tree(path)) or ""), f"{path}: opens with the command that runs it"


@pytest.mark.parametrize("name", NAMES)
def test_a_file_and_its_functions_are_introduced_and_short(name):
    path = PACKAGE / name
    lines = path.read_text().splitlines()
    assert len(lines) <= LONG.get(name, 400)
    if not lines:
        return
    assert ast.get_docstring(tree(path)), "a file opens like an essay"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
    public = [n for n in tree(path).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    bare = [n.name for n in public if not ast.get_docstring(n)]
    assert not bare, bare
