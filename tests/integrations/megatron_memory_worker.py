"""One process that trains a GPT of megatron-core in one of four ways and reports what its forward holds.

``megatron_memory_worker.py VARIANT DIRECTORY`` writes ``DIRECTORY/rank0.json``.

The operating system tells what is held: resident bytes of the process when the last layer and the loss have run, less
those before the step, or before the first step (then memory that the plugin keeps for itself counts too). The allocator
gives back at once what dies (a fixed threshold for mappings, and a trim), so that its cache does not count. Steps that
are timed are not stopped to look.
"""

import ctypes
import gc
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import megatron_shim
import torch
from megatron_cases import CORE_ATTENTION, Case

LAYERS, HIDDEN, HEADS, SEQUENCE, BATCH, VOCABULARY = 6, 512, 8, 512, 2, 256
WARM_UP_STEPS, MEASURED_STEPS = 2, 1
TIMED_STEPS = 3 if int(os.environ.get("SSDTRAIN_MEMORY_ROUNDS", "1")) > 1 else 1  # one round is not about time
SEED = 1234
MIB = 1 << 20
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SHAPE = {"hidden_size": HIDDEN, "num_attention_heads": HEADS}
VARIANTS = {
    "keep": Case("keep", config=SHAPE, num_layers=LAYERS),
    "selective": Case("selective", config=SHAPE | CORE_ATTENTION, num_layers=LAYERS),
    "full": Case("full", config=SHAPE | FULL, num_layers=LAYERS),
}
VARIANTS["offload"] = replace(VARIANTS["full"], name="offload")  # the same flags, and the plugin
# Small bounds: this is about memory. The drive of a test machine need not keep up with forward.
OPTIONS = {"policy": "all", "max_inflight_bytes": 16 * MIB, "prefetch_bytes": 16 * MIB}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def _status_bytes(field):
    """Read a field of this process's memory, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


class Memory:
    """Resident bytes of this process, without what the allocator or the collector could give back."""

    def __init__(self):
        self._libc = ctypes.CDLL(None)
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            assert self._libc.mallopt(option, 64 * 1024) == 1

    def settle(self):
        gc.collect()
        self._libc.malloc_trim(0)

    def held_bytes(self):
        self.settle()
        return _status_bytes("VmRSS")

    def begin_peak(self):
        """Forget the highest value so far."""
        Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self):
        return _status_bytes("VmHWM")


class Trainer:
    """Runs steps of one micro-batch under Megatron's schedule, and looks at the memory when forward has ended."""

    def __init__(self, case, options):
        import megatron_models as models
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        from ssdtrain_plugin.integrations.megatron import enable

        self._models, self._memory = models, Memory()
        model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)
        torch.manual_seed(SEED)
        config = models.transformer_config(case)
        self.model = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, SEQUENCE)
        self.num_calls = {"layer": 0, "core_attention": 0}
        for layer in self.model.decoder.layers:
            self._count(layer, "layer")
            self._count(layer.self_attention.core_attention, "core_attention")
        self.offload = None if options is None else enable(options)
        self._schedule = get_forward_backward_func()
        self._generator = torch.Generator().manual_seed(SEED)
        self._mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
        self._positions = torch.arange(SEQUENCE).expand(BATCH, -1)
        self._looks = False
        self._at_start = self._before = self._memory.held_bytes()
        self.seen = {}

    def _count(self, module, name):
        def count(*_):
            self.num_calls[name] += 1

        module.register_forward_pre_hook(count)

    def _forward(self, data, model):
        tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=self._generator)
        output = model(tokens[:, :-1], self._positions, self._mask, labels=tokens[:, 1:])
        return output, self._loss

    def _loss(self, output):
        loss = output.mean()
        self.seen["loss"] = loss.item().hex()
        if self._looks:
            self.seen["forward_peak_bytes"] = self._memory.peak_bytes() - self._before
            if self.offload is not None:
                self.offload.offloader.cache._queue.wait_idle()
            held = self._memory.held_bytes()
            self.seen |= {"held_bytes": held - self._before, "grown_bytes": held - self._at_start}
            self._memory.begin_peak()
        return loss, {}

    def step(self, *, looks=False):
        """Run forward and backward of one micro-batch; return their seconds, by the clock and of the processor."""
        self._looks = looks
        self._memory.settle()
        if looks:
            self._before = self._memory.held_bytes()
            self._memory.begin_peak()
        started, worked = time.perf_counter(), time.process_time()
        self._schedule(
            forward_step_func=self._forward,
            data_iterator=iter([None]),
            model=self.model,
            num_microbatches=1,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
        )
        seconds = time.perf_counter() - started, time.process_time() - worked
        if looks:
            self.seen["backward_peak_bytes"] = self._memory.peak_bytes() - self._before
        hashes, norm = self._models.digest([self.model])
        self._models.update([self.model])
        self.seen |= {"norm": norm, "gradients": hashes}
        return seconds


def train(name, directory):
    """Train one variant; return what was held, counted and timed."""
    tier = Path(directory) / "tier"
    tier.mkdir()
    stats = Path(directory) / "stats"
    options = None if name != "offload" else OPTIONS | {"paths": str(tier), "stats_path": str(stats)}
    trainer = Trainer(VARIANTS[name], options)
    for _ in range(WARM_UP_STEPS):
        trainer.step()
    for _ in range(MEASURED_STEPS):
        trainer.step(looks=True)
    trainer.num_calls = dict.fromkeys(trainer.num_calls, 0)
    clock, processor = zip(*(trainer.step() for _ in range(TIMED_STEPS)), strict=True)
    result = trainer.seen | {
        "step_seconds": statistics.median(clock),
        "processor_seconds": statistics.median(processor),
    }
    result |= {f"num_{kind}_calls": calls / TIMED_STEPS for kind, calls in trainer.num_calls.items()}
    if trainer.offload is not None:
        trainer.offload.disable()
        step = json.loads((stats / "rank0.jsonl").read_text().splitlines()[WARM_UP_STEPS + MEASURED_STEPS])
        result |= {key: step[key] for key in ("peak_activation_bytes", "saved_bytes", "stored_bytes", "stall_seconds")}
        result["files"] = sorted(os.listdir(tier))
    return result


def main(name, directory):
    megatron_shim.limit_address_space()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    megatron_shim.install(streams=True)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    (Path(directory) / "rank0.json").write_text(json.dumps(train(name, directory)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
