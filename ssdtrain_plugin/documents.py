"""Text that people wrote: read within bounds, and shown in an error within bounds, whatever it holds.

Note [Hostile text]. A file may be a pipe that never answers or a device that never ends, so only regular files of a
bounded size are read. YAML may nest without end, repeat itself exponentially through anchors, or hold scalars that
PyYAML's own constructors break at; all of it becomes a ``ValueError`` with the line. What is shown of a value has a
bounded length, also where the value contains itself.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import reprlib
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.units import KIB, format_bytes

__all__ = ["MAX_YAML_BYTES", "checked", "nearest", "parse_yaml", "read_regular", "read_text", "read_yaml", "shown"]

MAX_YAML_BYTES = 64 * KIB
"""A file of settings has a few kilobytes; a parser in Python takes seconds for what is larger than this."""

_MOST_MERGED = 256
_LONGEST_NAME = 64
_READABLE_BITS = 256
_TAG = "tag:yaml.org,2002:"

_Table = TypeVar("_Table", bound=BaseModel)


class _Shown(reprlib.Repr):
    """``repr`` of bounded length and depth."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 3
        self.maxstring = self.maxother = 60

    def repr_int(self, value: int, level: int) -> str:
        """Python refuses to write very long numbers."""
        return repr(value) if value.bit_length() <= _READABLE_BITS else f"a number of {value.bit_length()} bits"


def shown(value: object) -> str:
    """Write a value for an error.

    Args:
        value: Any, also one that contains itself.

    Returns:
        Its ``repr``, cut where it is long.
    """
    return _Shown().repr(value)


def nearest(name: str, names: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Ask whether another name was meant.

    Args:
        name: That is not among them.
        names: Those that there are.
        cutoff: How alike they must be (0 to 1).

    Returns:
        `` (did you mean `NAME`?)``, or nothing.
    """
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff) if len(name) <= _LONGEST_NAME else []
    return f" (did you mean `{near[0]}`?)" if near else ""


def read_regular(path: str | os.PathLike[str], *, max_bytes: int, flags: int = 0) -> bytes | None:
    """Read a regular file, and wait for nothing else.

    Args:
        path: Of anything.
        max_bytes: Of what is larger, one byte more than this is read.
        flags: For ``os.open``, in addition.

    Returns:
        What it holds; None if it is a pipe or a device.

    Raises:
        OSError: It cannot be read.
        ValueError: No file has such a name.
    """
    # Without O_NONBLOCK it would wait for the other end of a pipe.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(os.close, fd)
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        on_failure.pop_all()
    with os.fdopen(fd, "rb") as file:
        return file.read(max_bytes + 1) if stat.S_ISREG(mode) else None


def read_text(path: str | os.PathLike[str], *, max_bytes: int) -> str:
    """Read a file of text.

    Args:
        path: Of a regular file; a pipe or a device is refused, not waited for.
        max_bytes: What is larger is refused.

    Raises:
        ConfigError: It cannot be read.
    """
    if not isinstance(path, str | os.PathLike):  # a number would be a descriptor
        raise ConfigError("the name of a file", [f"{shown(path)} (expected a path)"], hint="pass a path")
    try:
        data = read_regular(path, max_bytes=max_bytes)
        text = (data or b"").decode("utf-8-sig")
    except OSError as error:
        kind = "a directory" if error.errno == errno.EISDIR else error.strerror
        raise ConfigError(f"`{path}`", [f"{kind} (expected a file)"], hint="check the path") from None
    except UnicodeDecodeError as error:
        problem = f"byte {error.start}: {error.reason} (expected text in UTF-8)"
        hint = "check that it is the file that you mean, saved as UTF-8"
        raise ConfigError(f"`{path}`", [problem], hint=hint) from None
    except ValueError as error:  # a null character, or one that no file name can hold
        raise ConfigError(f"`{path}`", [f"{error} (expected a path)"], hint="check the path") from None
    if data is None:
        raise ConfigError(f"`{path}`", ["a pipe or a device (expected a file)"], hint="name a file that holds text")
    if len(data) > max_bytes:
        problem = f"too large (expected at most {format_bytes(max_bytes)})"
        raise ConfigError(f"`{path}`", [problem], hint="check that it is the file that you mean")
    return text


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without its ways out: Note [Hostile text]."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that is there twice; otherwise the last one would win in silence."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {shown(key.value)} is there twice", key.start_mark)
            if name is not None:
                seen.add(name)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Bound what ``<<`` puts together: it can multiply with every level."""
        before = len(node.value)
        super().flatten_mapping(node)
        if len(node.value) > max(before, _MOST_MERGED):
            raise yaml.MarkedYAMLError(None, None, f"`<<` merges more than {_MOST_MERGED} keys", node.start_mark)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Name a scalar that is not what it looks like or is said to be, such as the 30th of February."""
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, ArithmeticError):
            problem = f"{shown(node.value)} is no valid {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(None, None, problem, node.start_mark) from None


def parse_yaml(text: str) -> Any:
    """Read YAML with plain values only.

    Args:
        text: Any; it may be wrong in every way.

    Raises:
        ValueError: Says in one line what is wrong, and where.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        said = ", ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise ValueError(f"{said.replace(_TAG, '!!')}{where}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply (expected a few levels)") from None


def read_yaml(path: str | Path) -> Any:
    """Read a file of YAML with plain values only.

    Args:
        path: Of a regular file of at most :data:`MAX_YAML_BYTES`.

    Raises:
        ConfigError: It cannot be read, or is not YAML.
    """
    text = read_text(path, max_bytes=MAX_YAML_BYTES)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"`{path}`", [str(error)], hint="check that it holds YAML") from None


def checked(kind: type[_Table], fields: Any, *, source: str, hint: str) -> _Table:
    """Turn what a file holds into a table of fields.

    Args:
        kind: The table.
        fields: As read.
        source: For the error, for example the path.
        hint: For the error.

    Raises:
        ConfigError: It has faults; all are listed.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems = [_problem(kind, dict(fault)) for fault in error.errors()]
        raise ConfigError(source, problems, hint=hint) from None


def _problem(kind: type[BaseModel], fault: dict[str, Any]) -> str:
    names = [str(part) for part in fault["loc"] if not str(part).startswith("function-")]
    name = ".".join(names) or "file"
    if fault["type"] == "extra_forbidden":
        return f"{name}: unknown field" + (nearest(name, kind.model_fields) if len(names) == 1 else "")
    if fault["type"] == "missing":
        return f"{name}: missing"
    if fault["type"] == "value_error":
        return f"{name}: {fault['msg'].removeprefix('Value error, ')}"
    wanted = fault["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{name}: {shown(fault['input'])} (expected {wanted})"
