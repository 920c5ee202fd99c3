"""Imports point one way: a package imports only those before it, and planning knows no process group."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    "presets", "config", "cpu", "data", "layout", "attention", "model", "precision", "training", "convert",
    "evaluation", "testing", "profiling",
)  # fmt: skip
PACKAGE_FILES = sorted((ROOT / "anchor_megatron").rglob("*.py"))
SCRIPTS = sorted(
    file
    for folder in (ROOT, ROOT / "tools", ROOT / "examples")
    for file in folder.glob("*.py")
    if not file.name.startswith(("bench_", "profile_"))  # they measure what testing/ makes up
)


def imported_modules(source: str, package: str) -> set[str]:
    """Dotted names that a file of `package` imports, at any depth; `from a import b` counts as `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            ancestors = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*ancestors, *([node.module] if node.module else [])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def part_of(module: str) -> str | None:
    """The entry of ORDER that a module of ours belongs to; None for others' and for the bare package."""
    words = module.split(".")
    if words[0] != "anchor_megatron" or len(words) == 1 or words[1].startswith("__"):
        return None
    return words[1]


def imports_of(file: Path) -> set[str]:
    return imported_modules(file.read_text(), ".".join(file.relative_to(ROOT).parent.parts))


def test_imported_modules_reads_every_form() -> None:
    source = "import a.b\nfrom c import d\ndef f():\n    from . import e\n    from ..g import h\n"
    assert imported_modules(source, "p.q") == {"a.b", "c.d", "p.q.e", "p.g.h"}


def test_the_order_names_every_part_of_the_package() -> None:
    parts = {
        file.relative_to(ROOT / "anchor_megatron").parts[0].removesuffix(".py") for file in PACKAGE_FILES
    }
    assert parts - {"__init__"} <= set(ORDER), "a new part of anchor_megatron needs its place in ORDER"


@pytest.mark.parametrize("file", PACKAGE_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_backwards_in_the_order(file: Path) -> None:
    own = part_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
    if own is None:
        allowed: tuple[str, ...] = ()
    else:
        allowed = ORDER[: ORDER.index(own) + 1]
    parts = {part_of(module) for module in imports_of(file)} - {None}
    assert parts <= set(allowed), f"{own} imports what comes after it: {parts - set(allowed)}"


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_scripts_do_not_import_testing(file: Path) -> None:
    assert "testing" not in {part_of(module) for module in imports_of(file)}


def test_layout_knows_no_process_group() -> None:
    for file in (ROOT / "anchor_megatron" / "layout").rglob("*.py"):
        assert not [name for name in imports_of(file) if name.startswith("torch.distributed")], file
        uses = [
            ast.unparse(node)
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Attribute)
        ]
        assert not [use for use in uses if use.startswith("torch.distributed")], file
