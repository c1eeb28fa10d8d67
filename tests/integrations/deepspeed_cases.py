"""What the worker trains and the tests compare. Imports nothing heavy."""

import dataclasses
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    name: str
    kind: str = "pipe"  # or dualpipe, plain
    zero: int = 0
    dtype: str = "fp32"
    microbatches: int = 4
    num_blocks: int = 4
    dropout: float = 0.0
    is_pair: bool = False  # stages send tuples
    interval: int = 0  # of activation checkpointing, pipeline
    use_reentrant: bool = True
    checkpointing: str | None = None  # how the plain model does it
    is_tracked: bool = False
    evaluates: bool = False
    retains_graph: bool = False
    seed: int = 1
    block: dict = field(default_factory=dict)

    def but(self, name, **changes):
        return dataclasses.replace(self, name=name, **changes)


RECOMPUTE = {"checkpointing": "recompute"}

_pipe = Case("")
_checkpointed = Case("", interval=1, dropout=0.1)
_non_reentrant = Case("", interval=1, dropout=0.1, use_reentrant=False)
PIPELINE = [
    *(_pipe.but(f"zero{zero}_{dtype}", zero=zero, dtype=dtype) for zero in (0, 1) for dtype in ("fp32", "bf16")),
    _pipe.but("tuples", is_pair=True),
    _non_reentrant.but("tuples_recompute", is_pair=True, block=RECOMPUTE),
    _checkpointed.but("offload"),
    _checkpointed.but("recompute", block=RECOMPUTE),
    _checkpointed.but("recompute_zero1_bf16", zero=1, dtype="bf16", block=RECOMPUTE),
    _non_reentrant.but("offload_non_reentrant"),
    _non_reentrant.but("recompute_non_reentrant", block=RECOMPUTE),
    _pipe.but("fraction", block={"policy": "fraction", "offload_fraction": 0.5}),
    _pipe.but("none", block={"policy": "none"}),
    _checkpointed.but("disabled", block={"enabled": False}),
    _pipe.but("evaluates", dropout=0.1, evaluates=True),
    _pipe.but("dualpipe", kind="dualpipe", num_blocks=6),
    _pipe.but("adaptive", block={"policy": "adaptive"}),
    _pipe.but("dualpipe_adaptive", kind="dualpipe", num_blocks=6, block={"policy": "adaptive"}),
]

_plain = Case("", kind="plain", microbatches=2, num_blocks=2)
_plain_checkpointed = _plain.but("", checkpointing="imported", dropout=0.1)
PLAIN = [
    *(
        _plain_checkpointed.but(f"{mode}_{how}", checkpointing=how, block={"checkpointing": mode})
        for mode in ("offload", "recompute")
        for how in ("imported", "attribute", "non_reentrant")
    ),
    _plain_checkpointed.but("tracked_random_states", is_tracked=True, block=RECOMPUTE),
    _plain_checkpointed.but("tracked_random_states_offload", is_tracked=True),
    # Reentrant checkpointing of integers trains nothing before the head, with us as without us.
    _plain_checkpointed.but("no_input_gradient", checkpointing="everything"),
    _plain.but("retains_graph", retains_graph=True),
    # ZeRO-3 last: it replaces functional.linear for the rest of the process.
    *(_plain.but(f"zero{zero}_{dtype}", zero=zero, dtype=dtype) for zero in (0, 1, 2, 3) for dtype in ("fp32", "bf16")),
    _plain_checkpointed.but("zero3_recompute", zero=3, block=RECOMPUTE),
]

SUITES = {"pipeline": PIPELINE, "plain": PLAIN}
