"""One rank that trains small GPTs of megatron-core on its device, each twice without the plugin and once with it.

``megatron_cuda_worker.py DIRECTORY CASE...`` writes ``DIRECTORY/rank<N>.json``: what was found, by case.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

STEPS, MICROBATCHES, SEED = 3, 4, 1234
LAYERS, HIDDEN, HEADS, SEQUENCE, BATCH, VOCABULARY = 4, 512, 8, 512, 2, 1024
MIB = 1 << 20
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CORE_ATTENTION = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}


@dataclass(frozen=True)
class Case:
    """One model in one layout.

    Attributes:
        layout: Sizes of the tensor- and pipeline-parallel groups and number of virtual stages.
        spec: ``te`` for TransformerEngine's layers, ``local`` for torch's.
        config: Fields of TransformerConfig.
        block: Options of the plugin.
        distributed: Megatron's DDP and its distributed optimizer take the steps.
        measures: Compare what forward holds with keeping and with full recomputation, not the gradients.
    """

    layout: tuple = (1, 1, None)
    spec: str = "local"
    config: dict = field(default_factory=dict)
    block: dict = field(default_factory=dict)
    distributed: bool = False
    measures: bool = False

    @property
    def num_ranks(self):
        return self.layout[0] * self.layout[1]


DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
DISTRIBUTE = {"distribute_saved_activations": True}
AGAIN = {"checkpointing": "recompute"}
OVERLAP = {"overlap_p2p_comm": True, "batch_p2p_comm": False}  # with emptied outputs: NCCL keeps the order of streams
CASES = {
    "local": Case(config=DROPOUT),
    "local_full": Case(config=DROPOUT | FULL),
    "local_recomputed": Case(config=DROPOUT | FULL, block=AGAIN),
    "local_core_attention": Case(config=DROPOUT | CORE_ATTENTION),
    "local_adaptive": Case(block={"policy": "adaptive"}),
    "local_host": Case(block={"host_bytes": 2048 * MIB}),
    "te": Case(spec="te", config=DROPOUT),
    "te_full": Case(spec="te", config=DROPOUT | FULL),
    "te_core_attention": Case(spec="te", config=DROPOUT | CORE_ATTENTION),
    "distributed_optimizer": Case(distributed=True, config=FULL),
    "te_distributed_optimizer": Case(spec="te", distributed=True),
    "memory": Case(config=FULL, measures=True),
    "te_memory": Case(spec="te", config=FULL, measures=True),
    "pp2": Case(layout=(1, 2, None), config=DROPOUT),
    "pp2_vpp2": Case(layout=(1, 2, 2), config=OVERLAP | FULL),
    "tp2": Case(layout=(2, 1, None), config=DROPOUT),
    "tp2_distributed_saves": Case(
        layout=(2, 1, None), config=FULL | {"distribute_saved_activations": True}, block=AGAIN
    ),
    "te_tp2_sequence_parallel": Case(layout=(2, 1, None), spec="te", config=DROPOUT | {"sequence_parallel": True}),
    "te_tp2_sequence_parallel_full": Case(layout=(2, 1, None), spec="te", config=FULL | {"sequence_parallel": True}),
}


def _config(case):
    from megatron.core.transformer.transformer_config import TransformerConfig

    tp, pp, vpp = case.layout
    common = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
        "pipeline_dtype": torch.bfloat16,
        "params_dtype": torch.bfloat16,
        "bf16": True,
        "deallocate_pipeline_outputs": True,
    }
    return TransformerConfig(**{**common, **case.config})


def _build(case):
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer.module import Float16Module

    makers = {
        "te": "get_gpt_layer_with_transformer_engine_spec",
        "local": "get_gpt_layer_local_spec",
    }
    config, chunks = _config(case), []
    for number in range(case.layout[2] or 1):
        chunk = number if case.layout[2] else None
        place = {"ignore_virtual": chunk is None, "vp_stage": chunk}
        model = GPTModel(
            config,
            getattr(gpt_layer_specs, makers[case.spec])(),
            VOCABULARY,
            SEQUENCE,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            vp_stage=chunk,
        )
        model = Float16Module(config, model.cuda())
        if case.distributed:
            ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)
            model = DistributedDataParallel(config, ddp, model)
            config.finalize_model_grads_func = finalize_model_grads
            config.no_sync_func = model.no_sync
        chunks.append(model)
    return chunks


def _optimizer(chunks):
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    options = {"optimizer": "adam", "lr": 1e-3, "bf16": True, "params_dtype": torch.bfloat16}
    return get_megatron_optimizer(OptimizerConfig(**options, use_distributed_optimizer=True, clip_grad=1.0), chunks)


class Training:
    """One model from its making to the end of its steps.

    Args:
        case: What to train.
        directory: For the tier; None trains without the plugin.
    """

    def __init__(self, case, directory=None):
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        from ssdtrain_plugin.integrations.megatron import enable

        torch.manual_seed(SEED)
        model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)
        self.chunks = _build(case)
        self.optimizer = _optimizer(self.chunks) if case.distributed else None
        common = {"paths": str(directory), "policy": "all", "min_tensor_bytes": 64 * 1024, "stats_path": str(directory)}
        self.offload = None if directory is None else enable(common | case.block)
        self._generator = torch.Generator().manual_seed(SEED)
        self.losses, self.settles, self.held_bytes = [], False, 0
        self._mask = None
        if case.spec == "local":
            self._mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool, device="cuda").triu(1)
        self._call = partial(
            get_forward_backward_func(),
            forward_step_func=self._forward,
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            data_iterator=[None] * len(self.chunks) if len(self.chunks) > 1 else None,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
        )

    def _forward(self, data, model):
        # Stages need not agree on the tokens: all that matters is that each run has the same.
        tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=self._generator).to("cuda")
        positions = torch.arange(SEQUENCE, device="cuda").expand(BATCH, -1)
        output = model(tokens[:, :-1].contiguous(), positions, self._mask, labels=tokens[:, 1:].contiguous())
        return output, self._loss

    def _loss(self, output):
        loss = output.float().mean()
        self.losses.append(loss.detach().clone())
        if self.settles:
            torch.cuda.synchronize()
            if self.offload is not None:
                self.offload.offloader.cache._queue.wait_idle()
            self.held_bytes = torch.cuda.memory_allocated() - self._before
        return loss, {}

    def step(self, *, settles=False, num_microbatches=MICROBATCHES):
        """Train one step; return every gradient of this rank, on the host."""
        self.settles = settles
        if self.optimizer is not None:
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        torch.cuda.synchronize()
        self._before = torch.cuda.memory_allocated()
        self._call(num_microbatches=num_microbatches)
        parameters = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
        gradients = [getattr(parameter, "main_grad", parameter.grad) for parameter in parameters]
        found = [None if gradient is None else gradient.detach().cpu().clone() for gradient in gradients]
        if self.optimizer is not None:
            self.optimizer.step()
        else:
            with torch.no_grad():
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter -= 0.05 * parameter.grad
                    parameter.grad = None
        return found

    def end(self):
        """Give everything back; return what the weights are and what is in the books."""
        weights = [parameter.detach().cpu().clone() for chunk in self.chunks for parameter in chunk.parameters()]
        if self.offload is None:
            return weights, None
        cache = self.offload.offloader.cache
        cache._queue.wait_idle()
        left = {"live_bytes": cache.live_bytes, "is_idle": cache.is_idle()}
        self.offload.disable()
        return weights, left


def _train(case, directory=None):
    training = Training(case, directory)
    # In the second step all is on the drive before backward; in the others stores and backward overlap.
    gradients = [training.step(settles=number == 1) for number in range(STEPS)]
    weights, left = training.end()
    return [[loss.cpu() for loss in training.losses], *gradients, weights], left


def _same(ours, plain):
    return all(
        (a is None and b is None) or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))
        for one, other in zip(ours, plain, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def _compare(case, directory):
    plain, _ = _train(case)
    again, _ = _train(case)
    ours, left = _train(case, directory)
    rank = torch.distributed.get_rank()
    lines = (Path(directory) / f"rank{rank}.jsonl").read_text().splitlines()
    return {
        "is_repeatable": _same(again, plain),
        "is_equal": _same(ours, plain),
        "is_trained": not _same(plain[1:2], plain[2:3]),
        "left": left,
        "steps": [json.loads(line) for line in lines],
        "files": sorted(name for name in os.listdir(directory) if not name.endswith(".jsonl")),
    }


def _measure(case, directory):
    """What forward holds of the device when its stores have ended: kept, recomputed, offloaded."""
    keep = Case(layout=case.layout, spec=case.spec)
    found = {}
    for name, each, place in (("keep", keep, None), ("full", case, None), ("offload", case, directory)):
        training = Training(each, place)
        for number in range(STEPS):
            training.step(settles=number == 1, num_microbatches=1)
            found[f"{name}_bytes"] = training.held_bytes
        training.end()
        del training
        torch.cuda.empty_cache()
    return found


def main(directory, *names):
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.distributed.init_process_group("nccl")
    from megatron.core import parallel_state

    results = {}
    for name in names:
        case = CASES[name]
        tp, pp, vpp = case.layout
        parallel_state.initialize_model_parallel(tp, pp, virtual_pipeline_model_parallel_size=vpp)
        tier = Path(directory) / f"{name}-{rank}"
        tier.mkdir()
        results[name] = (_measure if case.measures else _compare)(case, tier)
        parallel_state.destroy_model_parallel()
        (Path(directory) / f"rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
