"""Write the option table of the user guide from OffloadConfig, the one table of options.

Run by ``make docs``; ``tests/unit/test_option_table.py`` fails while the guide is stale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args, get_origin

from annotated_types import Ge, Le
from pydantic.fields import FieldInfo

from ssdtrain_plugin.config import OffloadConfig
from ssdtrain_plugin.units import format_bytes

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "user_guide.md"
BEGIN, END = "<!-- options -->", "<!-- /options -->"


def describe_type(name: str, field: FieldInfo) -> str:
    """Say in words what a value looks like.

    Args:
        name: Option name; its ending tells the unit.
        field: Its definition.

    Raises:
        TypeError: The option has a type that this table cannot put in words yet.
    """
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)] or [field.annotation]
    if get_origin(field.annotation) is Literal:
        return "one of " + ", ".join(f"`{choice}`" for choice in get_args(field.annotation))
    if field.annotation is bool:
        return "true or false"
    if get_origin(field.annotation) is tuple:
        return "a directory, or a list of one"
    if name.endswith(("_bytes", "_write_limit")):
        return "size in bytes, or text"
    if name.endswith("_path"):
        return "a directory"
    if field.annotation in (int, float) and len(kinds) == 1:
        low = next(limit.ge for limit in field.metadata if isinstance(limit, Ge))
        high = next(limit.le for limit in field.metadata if isinstance(limit, Le))
        return f"{'whole number' if field.annotation is int else 'number'}, {low} to {high}"
    raise TypeError(f"no words for the type of option `{name}`: {field.annotation}")


def describe_default(name: str, value: object) -> str:
    """Write a default as a user would type it.

    Args:
        name: Option name; its ending tells the unit.
        value: The default.
    """
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and name.endswith("_bytes"):
        return format_bytes(value)
    return f"`{value}`" if isinstance(value, str) else str(value)


def render_table() -> str:
    """Write the whole table in Markdown, ending in a line break."""
    lines = ["| option | value | default | meaning |", "|---|---|---|---|"]
    for name, field in OffloadConfig.model_fields.items():
        value, default = describe_type(name, field), describe_default(name, field.default)
        lines.append(f"| `{name}` | {value} | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def insert_table(text: str) -> str:
    """Replace what stands between the markers.

    Args:
        text: The user guide.

    Raises:
        ValueError: The markers are missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the user guide has no `{BEGIN}` and `{END}`")
    return f"{head}{BEGIN}\n{render_table()}{END}{tail}"


def main() -> None:
    """Rewrite the guide in place."""
    GUIDE.write_text(insert_table(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
