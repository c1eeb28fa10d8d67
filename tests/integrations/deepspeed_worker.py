"""One rank of a job that trains many small models in turn, each with and without the block.

``deepspeed_worker.py SUITE DIRECTORY`` writes ``DIRECTORY/rank<N>.json``: the results of every case of a suite.
"""

import dataclasses
import gc
import json
import os
import sys
import time
from pathlib import Path

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.activation_checkpointing import checkpointing as ds_checkpointing
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed_cases import SUITES, Case
from deepspeed_models import (
    Block,
    Embedding,
    GradientDigest,
    Head,
    PlainModel,
    batches,
    digest_of_parameters,
    loss_fn,
    open_extents,
)

import ssdtrain_plugin.integrations.deepspeed as ssdtrain_ds

STEPS = 3


def engine_config(case, block):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": case.microbatches,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000,
        "zero_optimization": {"stage": case.zero, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": case.dtype == "bf16"},
    }
    if case.interval:
        config["pipeline"] = {"activation_checkpoint_interval": case.interval, "use_reentrant": case.use_reentrant}
    return config if block is None else {**config, "ssdtrain": block}


def build_model(case):
    if case.kind == "plain":
        return PlainModel(case.num_blocks, case.dropout, case.checkpointing, case.is_tracked)
    layers = [
        LayerSpec(Embedding, case.is_pair),
        *(LayerSpec(Block, case.dropout, case.is_pair) for _ in range(case.num_blocks)),
        LayerSpec(Head, case.is_pair),
    ]
    make = DualPipeVModule if case.kind == "dualpipe" else PipelineModule
    return make(
        layers,
        num_stages=2,
        loss_fn=loss_fn,
        partition_method="uniform" if case.kind == "dualpipe" else "type:Block",
        checkpointable_layers=["Block"],
    )


class Job:
    """One engine, and what it did."""

    def __init__(self, case, block=None):
        self.case = case
        torch.manual_seed(case.seed)
        if case.is_tracked:
            tracker = ds_checkpointing.get_cuda_rng_tracker()
            tracker.reset()
            tracker.add("model-parallel-rng", case.seed + 2)
        model = build_model(case)
        self.gradients = GradientDigest(model)
        config = engine_config(case, block)
        initialize = deepspeed.initialize if block is None else ssdtrain_ds.initialize
        self.engine, *_ = initialize(model=model, model_parameters=list(model.parameters()), config=config)
        torch.manual_seed(case.seed + 1)
        seed = case.seed + (0 if case.kind != "plain" else deepspeed.comm.get_rank())
        self.batches, self.losses = batches(seed), []

    def step(self):
        if self.case.kind == "plain":
            self._plain_step()
            return
        self.losses.append(self.engine.train_batch(data_iter=self.batches).item().hex())
        if self.case.evaluates:
            self.losses.append(self.engine.eval_batch(data_iter=batches(99)).item().hex())

    def _plain_step(self):
        for _ in range(self.case.microbatches):
            loss = self.engine(*next(self.batches))
            if self.case.retains_graph:
                self.engine.backward(loss, retain_graph=True)
            self.engine.backward(loss)
            self.engine.step()
            self.losses.append(loss.item().hex())

    def result(self):
        return {
            "losses": self.losses,
            "gradients": self.gradients.hexdigest(),
            "parameters": digest_of_parameters(self.engine.module),
        }

    def close(self):
        self.engine.destroy()
        self.engine = None
        gc.collect()


def train(case, block=None):
    """Train a case from its beginning; with a block also report what was offloaded."""
    Block.num_calls = 0
    job = Job(case, block)
    live = []
    offloader = ssdtrain_ds.offloader_of(job.engine)
    for _ in range(STEPS):
        job.step()
        if offloader is not None:
            live.append(offloader.cache.live_bytes)
    result = job.result() | {"num_calls": Block.num_calls}
    if offloader is not None:
        directory = Path(block["paths"][0].replace("{local_rank}", os.environ["LOCAL_RANK"]))
        stats = Path(block["stats_path"]) / f"rank{deepspeed.comm.get_rank()}.jsonl"
        result |= {
            "live_bytes": live,
            "extents": open_extents(directory),
            "files": [entry.name for entry in directory.iterdir()],
            "report": offloader.report(),
        }
        offloader.detach()
        result |= {
            "steps": [json.loads(line) for line in stats.read_text().splitlines()],
            "extents_after": open_extents(directory),
            "files_after": [entry.name for entry in directory.iterdir()],
        }
    job.close()
    return result


def block_of(case, directory):
    drive = Path(directory) / "drive{local_rank}"
    Path(str(drive).replace("{local_rank}", os.environ["LOCAL_RANK"])).mkdir(exist_ok=True)
    return {
        "paths": [str(drive)],
        "policy": "all",
        "min_tensor_bytes": 0,
        "stats_path": str(Path(directory) / "stats" / case.name),
        **case.block,
    }


def run_suite(suite, directory):
    references, results = {}, {}
    for case in SUITES[suite]:
        started = time.perf_counter()
        plain = dataclasses.replace(case, name="", block={})
        key = json.dumps(dataclasses.asdict(plain), sort_keys=True)
        if key not in references:
            references[key] = train(plain)
        results[case.name] = {
            "without": references[key],
            "with": train(case, block_of(case, directory)),
            "seconds": time.perf_counter() - started,
        }
    return results


# ---------------------------------------------------------------------- what detach gives back


def touched(engine):
    """Everything that attaching may change, as it is seen from outside."""
    module = engine.module
    return {
        "instruction_map": engine.__dict__.get("_INSTRUCTION_MAP"),
        "schedule": engine.__dict__.get("_train_schedule"),
        "train_batch": engine.__dict__.get("train_batch"),
        "step": engine.__dict__.get("step"),
        "destroy": engine.__dict__.get("destroy"),
        "offloader": engine.__dict__.get("ssdtrain_offloader"),
        "activation_checkpoint_func": module.__dict__.get("activation_checkpoint_func"),
        "num_forward_hooks": len(module._forward_hooks),
        "num_forward_pre_hooks": len(module._forward_pre_hooks),
        "CheckpointFunction": ds_checkpointing.CheckpointFunction,
        "non_reentrant_checkpoint": ds_checkpointing.non_reentrant_checkpoint,
    }


def detach_in_the_middle(case, directory):
    job = Job(case)
    before = touched(job.engine)
    for _ in range(4):
        job.step()
    without = job.result()
    job.close()

    job = Job(case, block_of(case, directory))
    attached = touched(job.engine)
    offloader = ssdtrain_ds.offloader_of(job.engine)
    job.step()
    job.step()
    offloader.detach()
    offloader.detach()  # the second time does nothing
    after = touched(job.engine)
    Block.num_calls = 0
    job.step()
    job.step()
    result = job.result()
    calls = Block.num_calls
    job.close()
    return {
        "without": without,
        "with": result,
        "num_calls_after": calls,
        "changed": sorted(name for name in before if attached[name] is not before[name]),
        "not_restored": sorted(name for name in before if after[name] is not before[name]),
    }


def two_engines(case, directory):
    """One engine with the block and one without, in turns; then two with it, detached in the order of their birth."""
    without = train(case)
    offloaded, plain = Job(case, block_of(case, directory)), Job(case)
    calls = {"offloaded": 0, "plain": 0}
    torch_state = {}
    for step in range(STEPS):
        for name, job in (("offloaded", offloaded), ("plain", plain)):
            torch.set_rng_state(torch_state.get(name, torch.get_rng_state()))
            if not step:
                torch.manual_seed(case.seed + 1)
            Block.num_calls = 0
            job.step()
            calls[name] += Block.num_calls
            torch_state[name] = torch.get_rng_state()
    results = {"offloaded": offloaded.result(), "plain": plain.result()}
    plain.close()
    second = Job(case, block_of(case, directory))
    own = ds_checkpointing.CheckpointFunction
    ssdtrain_ds.offloader_of(offloaded.engine).detach()
    stays = ds_checkpointing.CheckpointFunction is own
    Block.num_calls = 0
    second.step()
    calls["second"] = Block.num_calls
    second.close()  # destroy() detaches
    offloaded.close()
    is_restored = isinstance(ds_checkpointing.CheckpointFunction, type)
    return {"without": without, **results, "calls": calls, "stays": stays, "is_restored": is_restored}


def let_go(case, directory, *, destroys):
    """An engine that is destroyed but still held, or that is only dropped, gives everything back."""
    job = Job(case, block_of(case, directory))
    job.step()
    num_open = len(open_extents(directory))
    if destroys:
        job.engine.destroy()
    else:
        del job
        gc.collect()
    return {
        "num_open": num_open,
        "num_open_after": len(open_extents(directory)),
        "is_restored": isinstance(ds_checkpointing.CheckpointFunction, type),
    }


def main():
    suite, directory = sys.argv[1:]
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    results = run_suite(suite, directory)
    pipe = Case("", dropout=0.1, interval=1)
    plain = Case("", kind="plain", microbatches=2, dropout=0.1, checkpointing="attribute")
    if suite == "pipeline":
        results["detach"] = detach_in_the_middle(pipe.but("detach"), directory)
        case = pipe.but("detach_non_reentrant", use_reentrant=False)
        results["detach_non_reentrant"] = detach_in_the_middle(case, directory)
        results["destroyed"] = let_go(pipe.but("destroyed"), directory, destroys=True)
    else:
        results["detach"] = detach_in_the_middle(plain.but("detach", checkpointing="imported"), directory)
        results["two_engines"] = two_engines(plain.but("two_engines"), directory)
        results["destroyed"] = let_go(plain.but("destroyed"), directory, destroys=True)
        # DeepSpeed itself keeps the engine of a last pipeline stage alive, so this is asked here only.
        results["dropped"] = let_go(plain.but("dropped"), directory, destroys=False)
    rank = deepspeed.comm.get_rank()
    (Path(directory) / f"rank{rank}.json").write_text(json.dumps(results))
    # What is still attached when the interpreter ends must not disturb its end.
    case = (pipe if suite == "pipeline" else plain).but("left")
    sys.left = Job(case, block_of(case, directory))
    sys.left.step()
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
