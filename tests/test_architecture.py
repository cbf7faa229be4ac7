"""The floors of gram_engine: a module imports from its own folder and from floors below it; few folders name CUDA."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "gram_engine"
FLOORS = (
    {"errors", "log", "metrics"},
    {"checksums", "files", "install", "kernels", "platform"},
    {"config"},
    {"data", "model"},
    {"checkpoint", "hf", "objectives", "planning"},
    {"convert", "scoring", "training"},
    {"benchmarks", "evaluation"},
    {"reproduce"},
    {"cli"},
)
MAY_NAME_CUDA = {"benchmarks", "install", "kernels", "platform"}
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    return module.removesuffix(".py").split("/")[0]


def imported_rooms(path: Path):
    """Rooms of gram_engine that a module imports, anywhere in its code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "gram_engine":
            yield from (alias.name for alias in node.names)
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split(".")[1] for name in names if name.startswith("gram_engine."))


def test_imports_point_downwards():
    upward = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        room = room_of(module)
        if room == "__init__":
            continue
        others = {other for other in imported_rooms(path) if other != room} if room in FLOOR else {"a room without a floor"}
        upward += [f"{module} -> {other}" for other in others if FLOOR.get(other, 99) >= FLOOR.get(room, 0)]
    assert not upward


def names_cuda(node: ast.AST) -> bool:
    """Whether a node of the syntax tree is torch.cuda, or compares something with "cuda"."""
    if isinstance(node, ast.Attribute):
        return node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch"
    if isinstance(node, ast.Compare):
        return any(isinstance(side, ast.Constant) and side.value == "cuda" for side in (node.left, *node.comparators))
    return isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.cuda")


def test_only_few_folders_name_cuda():
    found = {
        module
        for path in PACKAGE.rglob("*.py")
        if room_of(module := path.relative_to(PACKAGE).as_posix()) not in MAY_NAME_CUDA
        and any(map(names_cuda, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
    }
    assert not found
