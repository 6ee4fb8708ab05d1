"""The house keeps its walls: who may import whom, read from the source with ast (docs/architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

COMMON = {"constants", "errors", "hardware"}
"""Anyone may use these; they use nothing of llava."""

MAY_IMPORT: dict[str, set[str]] = {
    # room: rooms it may know, beside itself and COMMON
    "constants": set(),
    "errors": set(),
    "hardware": set(),
    "utils": set(),
    "reducers": set(),
    "conversation": {"mm_utils"},
    "mm_utils": set(),
    "model.vision_tower": {"reducers.features"},
    "model.projector": set(),
    "model.splice": set(),
    "model.packed": set(),
    "model.tokenization": set(),
    "model.llava_llama": {"model.vision_tower", "model.projector", "model.splice", "reducers", "mm_utils"},
    "model.language_model": {"model.llava_llama"},
    "model.checkpoints": {"reducers"}
    | {f"model.{name}" for name in ("llava_llama", "vision_tower", "projector", "tokenization")},
    "model.builder": {"reducers", "model.checkpoints", "model.packed"}
    | {f"model.{name}" for name in ("llava_llama", "vision_tower", "projector", "tokenization")},
    "model": {"model.checkpoints", "model.llava_llama", "model.builder"},
    # LLaVA's names for our commands: `python -m llava.model.consolidate`
    "model.consolidate": {"cli"},
    "model.apply_delta": {"cli"},
    "model.make_delta": {"cli"},
    "tools": {"model", "reducers"},
    "data": {"conversation", "mm_utils", "model.tokenization"},
    "train": {"data", "model", "conversation", "mm_utils", "reducers"},
    "eval": {"data", "model", "conversation", "mm_utils", "reducers", "utils"},
    "analysis": {"model", "mm_utils", "conversation", "reducers", "data"},
    "serve": {"model", "mm_utils", "conversation", "reducers", "utils"},
    "mini": {"model", "mm_utils", "conversation", "reducers", "data", "train", "eval", "analysis", "serve"},
    "cli": set(),
}  # fmt: skip


def room_of(module: str) -> str:
    """`llava.model.builder` -> `model.builder`, `llava.reducers.ops` -> `reducers` (longest known prefix)."""
    parts = module.split(".")[1:]
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in MAY_IMPORT:
            return name
    return ".".join(parts) or "llava"


def imports_of(path: Path, root: Path) -> set[str]:
    """Full names of the llava modules a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names.add(node.module or "")
            # `from llava.model import builder` imports the module llava.model.builder
            names |= {
                f"{node.module}.{alias.name}"
                for alias in node.names
                if (root / f"{node.module}.{alias.name}".replace(".", "/")).with_suffix(".py").is_file()
            }
    return {name for name in names if name == "llava" or name.startswith("llava.")}


def allowed(importer: str, imported: str) -> bool:
    room, target = room_of(importer), room_of(imported)
    if target in COMMON or target == room or target == "llava":
        return True
    permitted = MAY_IMPORT[room]
    full = imported.removeprefix("llava.")
    return any(full == name or full.startswith(name + ".") or target == name for name in permitted)


def modules(root: Path) -> list[tuple[str, Path]]:
    files = sorted((root / "llava").rglob("*.py"))
    return [(".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"), f) for f in files]


def test_import_directions(root: Path) -> None:
    wrong = []
    for module, path in modules(root):
        if module == "llava":
            continue
        assert room_of(module) in MAY_IMPORT, (
            f"{module} belongs to no room: add it to docs/architecture.md and here"
        )
        wrong += [
            f"{module} -> {name}" for name in sorted(imports_of(path, root)) if not allowed(module, name)
        ]
    assert not wrong, "imports through a wall:\n" + "\n".join(wrong)


def test_no_torchvision_anywhere(root: Path) -> None:
    for module, path in modules(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "torchvision" for name in names), module


@pytest.mark.parametrize(
    "module", ["llava.reducers.features", "llava.hardware", "llava.constants", "llava.errors"]
)
def test_the_lowest_rooms_import_alone(module: str) -> None:
    """They load without the rest of the house."""
    code = f"import sys, {module}; print([m for m in sys.modules if m.startswith('llava.')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(ast.literal_eval(out))
    assert {room_of(m) for m in loaded} <= {room_of(module)}


def test_every_file_says_what_it_is(root: Path) -> None:
    silent = [
        m
        for m, path in modules(root)
        if path.read_text(encoding="utf-8").strip()
        and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent, f"no docstring on top: {silent}"
