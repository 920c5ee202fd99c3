"""Every field with its default and its documentation, for `pretrain_anchor.py --help`."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields
from itertools import pairwise

from anchor_megatron.config.fields import Config

__all__ = ["describe"]

_INDENT = " " * 6


def describe() -> str:
    """All sections and fields as text: `section.field (default)`, below it what the field means."""
    lines = []
    defaults = Config()
    for section in fields(Config):
        values = getattr(defaults, section.name)
        documentation = _field_documentation(type(values))
        lines.append(f"{section.name}: {inspect.getdoc(type(values))}")
        for entry in fields(values):
            default = getattr(values, entry.name)
            shown = "required" if default == "???" else "null" if default is None else default
            lines.append(f"  {section.name}.{entry.name} ({shown})")
            text = documentation[entry.name]
            lines.append(textwrap.fill(text, 110, initial_indent=_INDENT, subsequent_indent=_INDENT))
    return "\n".join(lines)


def _field_documentation(section: type) -> dict[str, str]:
    """The string literal below each field of a dataclass, by the field's name."""
    definition = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(definition, ast.ClassDef), f"got {section}, expected a class"
    found = {}
    for statements in pairwise(definition.body):
        match statements:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found
