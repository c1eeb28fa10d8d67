"""OffloadConfig: the one table of options. Every surface is generated from it.

It reads no file system and knows no host: whether a directory can be used is
asked by :func:`ssdtrain_plugin.runtime.prepare`, which lists those faults
together with the ones found here.
"""

from __future__ import annotations

import re
import socket
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ssdtrain_plugin.documents import nearest, read_yaml, shown
from ssdtrain_plugin.errors import ConfigError, printable
from ssdtrain_plugin.units import GIB, LARGEST_BYTES, MIB, as_bytes

__all__ = ["OffloadConfig", "expand_path"]

_SHOULD = re.compile(r"^\w+ should (be|have) (a valid )?")
_HINT = "correct the lines above; the user guide lists every option"
_CONTROL = frozenset({"Cc", "Cs", "Zl", "Zp"})
_MOST_PATHS = 64
_WANTED = {
    "tuple_type": "a directory, or a list of them",
    "string_type": "text",
    "string_unicode": "text that UTF-8 can hold",
    "too_long": f"at most {_MOST_PATHS} directories",
    "string_too_short": "text that is not empty",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "float_type": "a number",
}


def _as_bytes(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)  # DeepSpeed's users write 5e8 in JSON, which is a float there
    return as_bytes(value)


def _as_bool(value: object) -> object:
    # A command line has only text.
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _as_paths(value: object) -> object:
    if isinstance(value, str | Path):
        return (str(value),)
    if isinstance(value, list | tuple):
        return tuple(str(item) if isinstance(item, Path) else item for item in value)
    return value


def _as_word(value: object) -> object:
    return "off" if value is False else value  # what YAML makes of the word


def _as_directory(path: str) -> str:
    # A log that shows it must stay one line, and the system takes no null character.
    if any(unicodedata.category(character) in _CONTROL for character in path):
        raise ValueError(f"{shown(path)} (expected a path without control characters)")
    return path


Directory = Annotated[str, Field(min_length=1), AfterValidator(_as_directory)]
Bytes = Annotated[int, BeforeValidator(_as_bytes), Field(le=LARGEST_BYTES)]
PositiveBytes = Annotated[Bytes, Field(gt=0)]


class OffloadConfig(BaseModel):
    """Every option of the plugin. Immutable; unknown keys are errors.

    Sizes are bytes, as an integer or as text such as ``"2 GiB"``.

    Raises:
        ConfigError: One or more options are wrong; all of them are listed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)

    enabled: bool = Field(default=True, description="Off switch: false trains as if the plugin were not there.")
    paths: Annotated[tuple[Directory, ...], BeforeValidator(_as_paths), Field(max_length=_MOST_PATHS)] = Field(
        default=(),
        description="Directories on the drives; several share the bytes by load and measured speed. `{local_rank}` and "
        "`{node}` are replaced. "
        "Needed unless `host_bytes` is given or `policy` is `none`.",
    )
    policy: Literal["adaptive", "all", "fraction", "none"] = Field(
        default="adaptive",
        description="What to offload: `adaptive` measures, and offloads what hides behind compute; `all`; `fraction`, "
        "see `offload_fraction`; `none` moves nothing and only counts.",
    )
    offload_fraction: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        allow_inf_nan=False,
        description="Share (0 to 1) of the bytes of a micro-batch to offload, the first in forward order, "
        "for `policy: fraction`. The first micro-batch is offloaded whole: its size is not known yet.",
    )
    min_tensor_bytes: Annotated[Bytes, Field(ge=0)] = Field(
        default=MIB, description="Smaller storages stay in device memory (bytes)."
    )
    host_bytes: Annotated[Bytes, Field(ge=0)] = Field(
        default=0,
        description="Budget of the host memory tier per rank (bytes). It takes what backward needs first, the drive "
        "the rest.",
    )
    disk_bytes: PositiveBytes | None = Field(
        default=None,
        description="Cap on the extent files per rank (bytes), shared evenly by `paths`. By default the free space "
        "minus 5 %.",
    )
    max_inflight_bytes: PositiveBytes = Field(
        default=2 * GIB,
        description="Stores queued but not done (bytes). When it is reached, `adaptive` keeps what comes, and the "
        "others wait and count the wait.",
    )
    prefetch_bytes: PositiveBytes = Field(
        default=2 * GIB,
        description="Loads ahead of backward, waiting in device memory (bytes). `adaptive` takes less where "
        "less is enough.",
    )
    io_engine: Literal["auto", "posix", "gds", "aio"] = Field(
        default="auto",
        description="How bytes reach the drive: `posix` by system calls, `gds` by GPUDirect Storage, `aio` by "
        "DeepNVMe. A named engine is used or refused; `auto` picks one and says why.",
    )
    io_threads: int = Field(default=4, ge=1, le=64, description="Worker threads per drive and direction.")
    io_timeout_seconds: float = Field(
        default=60.0,
        ge=0.1,
        le=86400.0,
        allow_inf_nan=False,
        description="A store, or the growth of a file for it, that takes longer is given up and its tensor stays in "
        "memory; a load that takes longer stops training (seconds). One second for 16 MiB is allowed in any "
        "case; a file grows by 256 MiB at a time.",
    )
    verify: Annotated[Literal["off", "checksum"], BeforeValidator(_as_word)] = Field(
        default="off",
        description="`checksum` hashes what is stored on a drive and compares at each load: bytes that come back wrong "
        "stop training instead of spoiling it. Costs a pass over the bytes in each direction.",
    )
    zero_on_free: Annotated[bool, BeforeValidator(_as_bool)] = Field(
        default=False,
        description="Overwrite activations on a drive with zeros as soon as they are not needed any more, and what is "
        "left at the end. Costs as much writing again. Not after SIGKILL.",
    )
    daily_write_limit: PositiveBytes | None = Field(
        default=None,
        description="Bytes that all runs of this user may write to one drive in one day (UTC), for example `2 TB`. "
        "After that tensors stay in memory until the next day.",
    )
    rated_write_bytes: PositiveBytes | None = Field(
        default=None,
        description="Endurance of one drive by its data sheet (TBW), for example `600 TB`: `report()` then says how "
        "long it lasts.",
    )
    checkpointing: Literal["offload", "recompute"] = Field(
        default="offload",
        description="What a region checkpointed by DeepSpeed's functions, by Megatron's `--recompute-granularity full` "
        "or by `ssdtrain.checkpoint` means: `offload` recomputes nothing, its saved tensors are offloaded; `recompute` "
        "recomputes it, its inputs are offloaded.",
    )
    stats_path: Directory | None = Field(
        default=None,
        description="Directory for one JSONL file of StepStats a rank, `rank<N>.jsonl`. `{local_rank}` and `{node}` "
        "are replaced.",
    )
    trace_steps: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Record the events of so many steps, after the first two, beside the statistics in "
        "`rank<N>.trace.jsonl`, for `ssdtrain report`. Needs `stats_path`.",
    )

    SOURCE: ClassVar[str] = "the ssdtrain options"

    def __init__(self, /, **options: Any) -> None:
        """Check every option.

        Args:
            **options: As in the table; see the fields.

        Raises:
            ConfigError: Lists every fault.
        """
        # Pydantic does not say where a name is that UTF-8 cannot hold; escaped, it is an unknown one.
        options = {printable(name): value for name, value in options.items()}
        try:
            super().__init__(**options)
        except ValidationError as error:
            problems = [*self._problems(error), *self._still_missing(error, options)]
            raise ConfigError(self.SOURCE, problems, hint=_HINT) from None
        missing = self._missing()
        if missing:
            raise ConfigError(self.SOURCE, missing, hint=_HINT)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> OffloadConfig:
        """Build from a mapping, for example a parsed JSON block.

        Args:
            options: Option names and values.

        Raises:
            ConfigError: Lists every fault.
        """
        if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
            problem = f"{shown(options)} (expected a mapping of option names to values)"
            raise ConfigError(cls.SOURCE, [problem], hint=_HINT)
        return cls(**options)

    @classmethod
    def from_yaml(cls, path: str | Path) -> OffloadConfig:
        """Build from a YAML file whose top level, or whose ``ssdtrain`` key, is the table.

        Args:
            path: The file.

        Raises:
            ConfigError: The file cannot be read, is not YAML, or has faults; all are listed.
        """
        options = read_yaml(path)
        if isinstance(options, Mapping) and set(options) == {"ssdtrain"}:
            options = options["ssdtrain"]
        try:
            return cls.from_dict(options)
        except ConfigError as error:
            raise ConfigError(f"`{path}`", error.problems, hint=error.hint) from None

    def _missing(self) -> list[str]:
        """List what single values cannot show: what is missing, and what would do nothing."""
        problems = []
        if self.enabled and self.policy != "none" and not self.paths and not self.host_bytes:
            problems.append("paths: missing (expected at least one directory on a drive)")
        if "offload_fraction" in self.model_fields_set and self.policy != "fraction":
            problems.append(
                f"offload_fraction: does nothing with `policy: {self.policy}` (expected `policy: fraction`)"
            )
        if not self.paths and self.host_bytes:
            of_drives = ("disk_bytes", "zero_on_free", "daily_write_limit", "rated_write_bytes")
            problems += [
                f"{name}: does nothing without `paths` (expected a directory on a drive)"
                for name in of_drives
                if getattr(self, name)
            ]
        if self.trace_steps and self.stats_path is None:
            problems.append("trace_steps: does nothing without `stats_path` (expected a directory)")
        return problems

    @classmethod
    def _still_missing(cls, error: ValidationError, options: Mapping[str, Any]) -> Sequence[str]:
        # Pydantic stops before the check of what is missing; ask again with the right options alone.
        wrong = {str(fault["loc"][0]) for fault in error.errors()}
        if wrong & {"paths", "host_bytes"}:
            return ()
        try:
            cls(**{name: value for name, value in options.items() if name not in wrong})
        except ConfigError as missing:
            return missing.problems
        return ()

    @classmethod
    def _problems(cls, error: ValidationError) -> list[str]:
        problems = []
        for fault in error.errors():
            name = ".".join(map(str, fault["loc"]))
            if fault["type"] == "extra_forbidden":
                problems.append(f"{name}: unknown option{nearest(name, cls.model_fields)}")
                continue
            if fault["type"] == "value_error":
                problems.append(f"{name}: {fault['msg'].removeprefix('Value error, ')}")
                continue
            wanted = _WANTED.get(fault["type"]) or _SHOULD.sub("", fault["msg"])
            problems.append(f"{name}: {shown(fault['input'])} (expected {wanted})")
        return problems


def expand_path(path: str, *, local_rank: int) -> str:
    """Replace the placeholders of a path.

    Args:
        path: May hold ``{local_rank}`` and ``{node}``; other braces stay as they are.
        local_rank: Rank of this process on its node.

    Returns:
        The path with ``{local_rank}`` and the host's name put in.
    """
    return path.replace("{local_rank}", str(local_rank)).replace("{node}", socket.gethostname())
