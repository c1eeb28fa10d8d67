"""What ``ssdtrain bench rok`` runs: stacks, their sizes and the number of rounds, from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ssdtrain_plugin.bench.models import FAMILIES, VOCABULARY, DecoderShape
from ssdtrain_plugin.documents import checked, read_yaml
from ssdtrain_plugin.projection import ModelSpec
from ssdtrain_plugin.projection.arithmetic import model_flops
from ssdtrain_plugin.units import GIB, KIB, LARGEST_BYTES, MIB, as_bytes

__all__ = ["OUR_STRATEGIES", "RokMatrix", "Stack", "quick_matrix", "read_matrix"]

OUR_STRATEGIES = ("keep", "recompute", "selective", "all", "adaptive", "host")
"""In the order of the report; peers follow."""

_RESERVED = ("paths", "policy", "host_bytes", "enabled", "offload_fraction")

_Count = Annotated[int, Field(gt=0, le=100_000_000)]
_Bytes = Annotated[int, BeforeValidator(as_bytes), Field(gt=0, le=LARGEST_BYTES)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Stack(_Strict):
    """One stack of layers and the micro-batch at which all strategies are compared.

    Attributes:
        name: For the report.
        family: ``gpt``, ``bert`` or ``t5``.
        layers: All of them; of ``t5`` half, rounded down, decode.
        hidden: Width of the residual stream.
        heads: Attention heads.
        sequence: Tokens of a sequence; ``t5`` reads so many and writes so many.
        microbatch: Sequences of a micro-batch.
        dtype: Name of torch's type of weights and activations.
        attention: ``flash`` is torch's fused one, ``naive`` saves the scores.
    """

    name: str
    family: str = "gpt"
    layers: _Count
    hidden: _Count
    heads: _Count
    sequence: _Count
    microbatch: _Count
    dtype: str = "float32"
    attention: str = "flash"

    @model_validator(mode="after")
    def _is_possible(self) -> Stack:
        _ = self.shape  # refuses what no stack can have
        return self

    @property
    def shape(self) -> DecoderShape:
        """The sizes as the models take them."""
        return DecoderShape(**self.model_dump(exclude={"name"}))

    @property
    def tokens(self) -> int:
        """Tokens of one sequence that go through layers."""
        return self.shape.row_tokens - 1

    @property
    def flops(self) -> float:
        """Operations of forward and backward of one sequence, without what is recomputed."""
        sizes = self.model_dump(include={"family", "layers", "hidden", "heads", "sequence", "attention"})
        return model_flops(ModelSpec(**sizes, vocab=VOCABULARY, head_transform=False))


class RokMatrix(_Strict):
    """What is run.

    Attributes:
        stacks: Each is a comparison of its own.
        strategies: Of :data:`OUR_STRATEGIES`, ``keep`` among them.
        peers: Whether other people's ways are run too.
        rounds: Steps of each strategy that count, interleaved.
        warm_up_rounds: Rounds before them, in which the adaptive policy learns.
        budget: Of activations, as a share of the peak of ``keep``.
        budget_rounds: Steps that count at the largest micro-batch that fits the budget.
        budget_warm_up_rounds: Rounds before them.
        largest_factor: The search for that micro-batch ends at so many times the stack's.
        threads: Compute threads.
        host_bytes: Bound of the host tier of the strategy ``host`` (bytes).
        options: Of the plugin, for every strategy that moves bytes.
    """

    stacks: Annotated[tuple[Stack, ...], BeforeValidator(lambda value: _as_tuple(value)), Field(min_length=1)]
    strategies: Annotated[tuple[str, ...], BeforeValidator(lambda value: _as_tuple(value))] = OUR_STRATEGIES
    peers: bool = True
    rounds: _Count = 7
    warm_up_rounds: _Count = 4
    budget: Annotated[float, Field(gt=0, le=1)] = 0.4
    budget_rounds: _Count = 5
    budget_warm_up_rounds: _Count = 3
    largest_factor: _Count = 4
    threads: _Count = 1
    host_bytes: _Bytes = 4 * GIB
    options: dict[str, Any] = Field(
        default_factory=lambda: {"prefetch_bytes": 64 * MIB, "max_inflight_bytes": 64 * MIB}
    )

    @field_validator("strategies")
    @classmethod
    def _are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if "keep" not in names or len(set(names)) < len(names) or set(names) - set(OUR_STRATEGIES):
            raise ValueError(
                f"{', '.join(names)} (expected each once, `keep` among them, of {', '.join(OUR_STRATEGIES)})"
            )
        return names

    @field_validator("stacks")
    @classmethod
    def _have_names(cls, stacks: tuple[Stack, ...]) -> tuple[Stack, ...]:
        names = [stack.name for stack in stacks]
        if len(set(names)) < len(names):
            raise ValueError(f"names {', '.join(names)} (expected a name of its own for each)")
        return stacks

    @field_validator("options")
    @classmethod
    def _leave_strategies_alone(cls, options: dict[str, Any]) -> dict[str, Any]:
        wrong = sorted(set(options) & set(_RESERVED))
        if wrong:
            raise ValueError(f"{', '.join(wrong)} (expected no option that makes a strategy what it is)")
        return options


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def quick_matrix() -> RokMatrix:
    """Three small stacks: under ten minutes on two cores.

    The smallest ones that still say something: a step has enough arithmetic for each byte that it saves, and hidden
    states of 2 MiB, which torch lays in huge pages on a CPU, so that they reach the drive without a copy.
    """
    stacks = tuple(
        Stack(name=family, family=family, layers=2, hidden=512, heads=8, sequence=128, microbatch=8)
        for family in FAMILIES
    )
    # A stack saves some 70 MiB: with wider bounds all of it might be in flight, and no peak would be lower.
    options = {"min_tensor_bytes": 64 * KIB, "max_inflight_bytes": 12 * MIB, "prefetch_bytes": 12 * MIB}
    return RokMatrix(
        stacks=stacks,
        rounds=7,
        warm_up_rounds=3,
        budget_rounds=3,
        budget_warm_up_rounds=2,
        largest_factor=2,
        options=options,
    )


def read_matrix(path: str | Path) -> RokMatrix:
    """Read a matrix.

    Args:
        path: A YAML file with the fields of :class:`RokMatrix`.

    Raises:
        ConfigError: It cannot be read, is not YAML, or has faults; all are listed.
    """
    return checked(RokMatrix, read_yaml(path), source=f"`{path}`", hint="see configs/bench/")
