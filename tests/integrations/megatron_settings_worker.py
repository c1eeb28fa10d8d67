"""What the plugin makes of Megatron's own settings and schedules, in one process without communication.

``megatron_settings_worker.py RESULT`` writes a JSON file: for real configs of the installed megatron-core what is
refused, and for its real schedules in which order they run their passes, beside what the plugin expects.
"""

import json
import sys
import warnings
from pathlib import Path

import megatron_shim
import torch

SMALL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
EXPERTS = {"num_moe_experts": 2, "moe_grouped_gemm": True, "add_bias_linear": False}
STASH = {
    "moe_expert_rank_capacity_factor": 1.0,
    "moe_token_dispatcher_type": "flex",
    "moe_flex_dispatcher_backend": "hybridep",
    "use_transformer_engine_op_fuser": True,
}
COMBINED = {
    "expert_model_parallel_size": 2,
    "moe_token_dispatcher_type": "alltoall",
    "bf16": True,
    "params_dtype": torch.bfloat16,
}
DELTA_NET = {
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": 2,
    "linear_conv_kernel_dim": 4,
    **{f"linear_{name}_head_dim": 16 for name in ("key", "value")},
    **{f"linear_num_{name}_heads": 4 for name in ("key", "value")},
}


def selective(*modules):
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
OFFLOADING = {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn"]}
# Fields of a config on top of the small one.
SETTINGS = {
    "plain": {},
    "full": FULL,
    "full_fp8": FULL | {"fp8": "hybrid"},
    "selective": {"recompute_granularity": "selective"},
    "core_attn": selective("core_attn"),
    "mlp_without_bias": selective("mlp") | {"add_bias_linear": False},
    "moe": selective("moe") | EXPERTS,
    "layernorm": selective("core_attn", "layernorm"),
    "moe_act": selective("moe_act") | EXPERTS,
    "mla_up_proj": selective("mla_up_proj"),
    "gdn_norm_out": selective("gdn_norm_out") | DELTA_NET,
    "mlp": selective("mlp"),
    "fine_grained": OFFLOADING,
    "cpu_offloading": {"cpu_offloading": True, "cpu_offloading_num_layers": 1},
    "combined": EXPERTS | COMBINED | {"overlap_moe_expert_parallel_comm": True},
    "graph_local": {"cuda_graph_impl": "local"},
    "graph_transformer_engine": {"cuda_graph_impl": "transformer_engine"},
    "graph_full_iteration": {"cuda_graph_impl": "full_iteration"},
    "graph_enabled": {"enable_cuda_graph": True},
    "graph_external": {"external_cuda_graph": True},
    "paged_stash": EXPERTS | STASH | {"moe_paged_stash": True},
    "several": selective("layernorm", "mlp") | OFFLOADING,
}
# Stages, virtual stages or None, micro-batches, micro-batches in a group of a virtual stage, overlapping communication.
LAYOUTS = [
    (1, None, 1, None, False),
    (1, None, 4, None, False),
    (2, None, 4, None, False),
    (4, None, 8, None, False),
    (4, None, 2, None, False),
    (2, 2, 4, None, True),
    (4, 2, 8, None, False),
    (4, 2, 4, None, False),
    (4, 3, 8, None, True),
    (2, 2, 6, 3, False),
    (2, 3, 7, 4, False),
]


def problems_of(fields):
    """Build a real config; list what is refused of it, or None if this release knows no such setting."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    from ssdtrain_plugin.errors import ConfigError
    from ssdtrain_plugin.integrations.megatron.refusals import refuse

    kind = MLATransformerConfig if "mla_up_proj" in fields.get("recompute_modules", ()) else TransformerConfig
    try:
        config = kind(**SMALL, **fields)
    except (TypeError, AssertionError) as error:
        if "unexpected keyword" in str(error) or "Invalid c" in str(error):
            return None
        raise
    try:
        refuse(config)
    except ConfigError as error:
        return list(error.problems)
    return []


class Group:
    """A process group that is asked for its size only."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


class Communicator:
    """Sends to nobody and receives nothing; answers who is where."""

    def __init__(self, config, rank, size):
        self.config, self.pp_group = config, Group(rank, size)
        self.virtual_pipeline_model_parallel_size = config.virtual_pipeline_model_parallel_size
        self.current_stage, self.total_stages = rank, size
        self.is_pp_first_stage, self.is_pp_last_stage = rank == 0, rank == size - 1

    def __getattr__(self, name):
        if not name.startswith(("send_", "recv_")):
            raise AttributeError(name)
        is_pair = name.endswith("recv_forward_backward")
        return lambda *args, **kwargs: (None, None) if is_pair or kwargs.get("overlap_p2p_comm") else None


def groups(rank, size):
    from megatron.core.process_groups_config import ProcessGroupCollection

    collection = ProcessGroupCollection()
    for name in ("tp", "cp", "dp_cp", "embd", "pos_embd"):
        setattr(collection, name, Group(0, 1))
    collection.pp = Group(rank, size)
    return collection


class Recorder:
    """Stands where Megatron's two step functions stand, and notes which micro-batch each call is about."""

    def __init__(self):
        self.passes, self._slots = [], {}

    def forward_step(self, *args, **kwargs):
        slot = kwargs.get("vp_stage") or 0, kwargs["current_microbatch"]
        output = [torch.zeros(1)]
        self._slots[id(output)] = slot, output
        self.passes.append((slot, False))
        return output, torch.zeros([], dtype=torch.int)

    def backward_step(self, input_tensor, output_tensor, *args, **kwargs):
        self.passes.append((self._slots.pop(id(output_tensor))[0], True))


def order_of(layout, rank):
    """Run a real schedule; return the passes that it ran, and those that were expected of it."""
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from ssdtrain_plugin.integrations.megatron.order import passes_of

    stages, chunks, microbatches, group, overlaps = layout
    config = TransformerConfig(
        **SMALL | {"num_layers": stages * (chunks or 1)},
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks,
        microbatch_group_size_per_vp_stage=group,
        overlap_p2p_comm=overlaps,
        batch_p2p_comm=not overlaps,
        pipeline_dtype=torch.float32,
    )
    models = [torch.nn.Identity() for _ in range(chunks or 1)]
    for model in models:
        model.config, model.model_type = config, ModelType.encoder_or_decoder
    arguments = {
        "forward_step_func": None,
        "data_iterator": [None] * len(models) if chunks else None,
        "model": models if chunks else models[0],
        "num_microbatches": microbatches,
        "seq_length": 8,
        "micro_batch_size": 1,
        "p2p_communicator": Communicator(config, rank, stages),
        "pg_collection": groups(rank, stages),
    }
    function = schedules.get_forward_backward_func(stages, chunks)
    recorder, own = Recorder(), (schedules.forward_step, schedules.backward_step)
    schedules.forward_step, schedules.backward_step = recorder.forward_step, recorder.backward_step
    try:
        function(**arguments)
    finally:
        schedules.forward_step, schedules.backward_step = own
    expected = passes_of(function.__name__, arguments)
    return {"ran": recorder.passes, "expected": [(each.slot, each.is_backward) for each in expected]}


def main(result):
    warnings.simplefilter("ignore")  # of Megatron, about what is not installed
    with megatron_shim.on_cpu():
        found = {
            "problems": {name: problems_of(fields) for name, fields in SETTINGS.items()},
            "orders": [[order_of(layout, rank) for rank in range(layout[0])] for layout in LAYOUTS],
        }
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
