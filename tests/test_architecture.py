"""docs/architecture.md and docs/reading.md against the tree: arrows, circles, the files that they name."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("hybridlm", "pallas_kernels", "configs", "eval", "launch")
# What a kind says of its names in public checkpoints with; the rest of `hybridlm.convert` are converters.
VOCABULARY = {
    f"hybridlm.convert.{name}" for name in ("public", "public_attention", "public_experts", "fields", "rules")
}


def named(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {named(path): path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}


def imports(tree: ast.Module, inside: bool) -> set[str]:
    """Modules of ours that a module imports; inside: functions of it, too. Imports for mypy do not count."""
    found, waiting = set(), list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{one.name}" for one in node.names}
            found |= {one if one in MODULES else node.module for one in whole}
        if isinstance(node, ast.stmt) and (inside or not isinstance(node, ast.FunctionDef)):
            waiting += ast.iter_child_nodes(node)
    return found & set(MODULES)


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def test_arrows_point_one_way(trees):
    edges = {(name, one) for name, tree in trees.items() for one in imports(tree, inside=True)}
    rooms = {(name.split(".")[0], one.split(".")[0]) for name, one in edges}
    assert ("hybridlm", "pallas_kernels") in rooms and ("launch", "hybridlm") in rooms
    assert not rooms & {("hybridlm", room) for room in ("configs", "eval", "launch")}
    assert not rooms & {("pallas_kernels", room) for room in ROOMS if room != "pallas_kernels"}


def reached(edges: dict[str, set[str]], start: str) -> set[str]:
    seen, waiting = set(), [start]
    while waiting:
        new = edges[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


def test_no_circles_and_no_converters_in_training(trees):
    edges = {name: imports(tree, inside=False) for name, tree in trees.items()}
    assert not [name for name in edges if name in reached(edges, name)]
    training = reached(edges, "hybridlm.trainer")
    assert {"hybridlm.program", "hybridlm.mixers", "hybridlm.run.checkpoint"} <= training
    assert {one for one in training if one.startswith("hybridlm.convert.")} <= VOCABULARY


def test_every_module_has_its_place():
    """Each module of `hybridlm` and of `run` is named in architecture.md, and what is named is there."""
    text = (ROOT / "docs/architecture.md").read_text()
    for folder in ("hybridlm", "hybridlm/run"):
        names = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
        assert not {name for name in names if not re.search(rf"\b{name}\b", text)}, folder
    files = set(re.findall(r"`([\w/]+\.py)`", text)) - {"configs/x.py"}
    rooms = ("", "hybridlm", "pallas_kernels", "pallas_kernels/linear_attention")
    assert files and not {file for file in files if not any((ROOT / room / file).is_file() for room in rooms)}


def test_twelve_files_to_read():
    lines = (ROOT / "docs/reading.md").read_text().splitlines()
    assert len(lines) <= 60 and [line[:4].strip("| ") for line in lines if re.match(r"\| \d", line)] == [
        str(number) for number in range(1, 13)
    ]
    files = re.findall(r"\]\(\.\./([\w/]+\.py)\)", "\n".join(lines))
    assert len(files) >= 12 and all((ROOT / file).is_file() for file in files)
    for file in re.findall(r"`([\w/]+\.py)`[ ,.)(]", "\n".join(lines)):
        assert any((ROOT / room / file).is_file() for room in ("", "hybridlm")), file
