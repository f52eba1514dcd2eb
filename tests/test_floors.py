"""Imports point down the floors of the house, function-level ones included."""

from __future__ import annotations

import ast
from pathlib import Path

import captune

SOURCE = Path(captune.__file__).parent

# A room is a module or a package of captune; it imports from lower floors or from itself.
FLOORS = {
    "errors": 0,
    "console": 0,
    "files": 0,
    "preprocess": 0,
    "recipes": 0,
    "config": 0,
    "device": 0,
    "processes": 0,
    "matching": 1,
    "ranks": 1,
    "rowfile": 1,
    "data": 1,
    "encoders": 1,
    "bank": 2,
    "features": 2,
    "download": 2,
    "losses": 2,
    "metrics": 2,
    "models": 2,
    "training": 3,
    "evaluation": 4,
    "report": 6,
    "workflow": 7,
    "notebook": 8,
    "cli": 8,
    "__main__": 9,
}
# Within the ground floor, in this order.
GROUND = ("errors", "console", "files", "preprocess", "device", "processes", "recipes", "config")
# The façade hands names on lazily; only its version may be read from below.
FACADE = "__init__"


def modules() -> list[tuple[str, Path]]:
    return [
        (path.relative_to(SOURCE).parts[0].removesuffix(".py"), path)
        for path in sorted(SOURCE.rglob("*.py"))
        if path != SOURCE / "__init__.py"
    ]


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            parts = node.module.split(".")
            if parts[0] == "captune":
                rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("captune.")}
    return rooms - {"__version__"}


def test_every_room_has_a_floor() -> None:
    assert {room for room, _ in modules()} == set(FLOORS)


def test_imports_point_down() -> None:
    wrong = []
    for room, path in modules():
        for other in imported_rooms(path) - {room}:
            if FLOORS[room] == FLOORS[other] == 0:
                if GROUND.index(other) > GROUND.index(room):
                    wrong.append(f"{path.name} -> {other}")
            elif FLOORS[other] >= FLOORS[room]:
                wrong.append(f"{path.name} (floor {FLOORS[room]}) -> {other}")
    assert wrong == []


def module_imports() -> dict[str, set[str]]:
    """Which captune modules each module imports at its top level."""
    graph: dict[str, set[str]] = {}
    for _, path in modules():
        name = ".".join(("captune", *path.relative_to(SOURCE).with_suffix("").parts))
        graph[name.removesuffix(".__init__")] = {
            module
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module
            for module in [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            if module.startswith("captune.")
        }
    return graph


def test_no_package_imports_in_a_circle() -> None:
    graph = module_imports()

    def reach(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        for other in graph.get(name, ()):
            if other in graph and other != name:
                reach(other, (*path, name))

    for name in graph:
        reach(name, ())


def test_no_import_of_torchvision_or_timm() -> None:
    """They do not import beside a CPU torch, so captune must run without them."""
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"torchvision", "timm", "pickle"}, path
