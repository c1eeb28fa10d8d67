"""What megatron-core trains in the tests: model, layout, flags."""

from dataclasses import dataclass, field

MICROBATCHES = 4


@dataclass(frozen=True)
class Case:
    """One model in one layout, trained with and without the plugin.

    Attributes:
        name: In the results.
        model: ``gpt``, ``bert`` or ``t5``.
        layout: Sizes of the tensor- and pipeline-parallel groups and number of virtual stages.
        config: Fields of TransformerConfig on top of the common ones.
        block: Options on top of the common ones.
        num_layers: Of all stages together.
        microbatches: Of one step.
        uses_ddp: Wrapped by Megatron's DDP, which reduces the gradients.
        dtype: ``bf16`` wraps the model in Float16Module.
        evaluates: Runs a forward-only schedule between the steps.
    """

    name: str
    model: str = "gpt"
    layout: tuple = (1, 1, None)
    config: dict = field(default_factory=dict)
    block: dict = field(default_factory=dict)
    num_layers: int = 4
    microbatches: int = MICROBATCHES
    uses_ddp: bool = False
    dtype: str = "fp32"
    evaluates: bool = False


def _full(method, num_layers, **more):
    return {
        "recompute_granularity": "full",
        "recompute_method": method,
        "recompute_num_layers": num_layers,
        **more,
    }


CORE_ATTENTION = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
VARIABLE = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
OVERLAP = {"overlap_p2p_comm": True, "batch_p2p_comm": False, "deallocate_pipeline_outputs": False}

ONE = [
    Case("gpt"),
    Case("gpt_dropout", config=DROPOUT, evaluates=True),
    Case("gpt_bf16", dtype="bf16"),
    Case("gpt_adaptive", block={"policy": "adaptive"}),
    Case("gpt_full_block", config=_full("block", 2) | DROPOUT),
    Case("gpt_full_uniform", config=_full("uniform", 1) | DROPOUT),
    Case("gpt_full_recomputed", config=_full("uniform", 2) | DROPOUT, block={"checkpointing": "recompute"}),
    Case("gpt_core_attention", config=CORE_ATTENTION | DROPOUT),
    Case("gpt_mtp", config={"mtp_num_layers": 1}),
    Case("bert", model="bert", config=DROPOUT),
    Case("bert_full", model="bert", config=_full("uniform", 1)),
    Case("t5", model="t5", config=DROPOUT),
    Case("t5_full", model="t5", config=_full("block", 1)),
]
TWO = [
    Case("pp2", layout=(1, 2, None), evaluates=True),
    Case("pp2_no_batched_p2p", layout=(1, 2, None), config={"batch_p2p_comm": False}),
    Case("pp2_variable_lengths", layout=(1, 2, None), config=VARIABLE),
    Case("pp2_full", layout=(1, 2, None), config=_full("block", 1) | DROPOUT),
    Case("pp2_core_attention", layout=(1, 2, None), config=CORE_ATTENTION),
    Case("pp2_adaptive", layout=(1, 2, None), block={"policy": "adaptive"}),
    Case("pp2_bert", model="bert", layout=(1, 2, None)),
    Case("pp2_vpp2", layout=(1, 2, 2), config=OVERLAP),
    Case("tp2", layout=(2, 1, None)),
    Case("tp2_sequence_parallel", layout=(2, 1, None), config={"sequence_parallel": True}),
    Case("tp2_distributed_saves", layout=(2, 1, None), config=_full("uniform", 1, distribute_saved_activations=True)),
    Case("tp2_t5", model="t5", layout=(2, 1, None)),
    Case("dp2", uses_ddp=True),
]
FOUR = [
    Case("pp4_vpp2", layout=(1, 4, 2), num_layers=8, microbatches=8),
    Case("pp4_vpp2_full", layout=(1, 4, 2), num_layers=8, microbatches=8, config=_full("uniform", 1)),
    Case("tp2_pp2", layout=(2, 2, None), config=DROPOUT),
    Case("tp2_pp2_core_attention", layout=(2, 2, None), config=CORE_ATTENTION),
]
EIGHT = [
    Case("tp2_pp2_dp2", layout=(2, 2, None), uses_ddp=True),
    Case("tp2_pp2_dp2_full", layout=(2, 2, None), uses_ddp=True, config=_full("block", 2)),
]

SUITES = {"one": (1, ONE), "two": (2, TWO), "four": (4, FOUR), "eight": (8, EIGHT)}

# Also on the newest release in `make test`: each model, each kind of layout, each kind of recomputation once.
NEWEST_TOO = {
    *("gpt_dropout", "gpt_bf16", "gpt_full_block", "gpt_full_uniform", "gpt_core_attention", "gpt_mtp"),
    *("bert", "t5_full"),
    *("pp2", "pp2_full", "pp2_vpp2", "tp2_sequence_parallel", "tp2_distributed_saves", "dp2"),
    *("pp4_vpp2_full", "tp2_pp2"),
}
