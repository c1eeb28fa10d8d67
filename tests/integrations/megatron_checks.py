"""What the checks of the Megatron integration have in common: a model, a run of it, and the comparison of two runs.

A check is a function ``check_...(directory)`` in one of the modules ``megatron_checks_...``. It runs inside of a rank
started by ``megatron_blocks_worker.py``, once for each interpreter, and asserts.
"""

import contextlib
import gc
import json
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from ssdtrain_plugin.integrations.megatron import enable
from ssdtrain_plugin.integrations.megatron.takeover import enabled

SEED = 4321
STEPS, MICROBATCHES = 2, 4
SEQUENCE, BATCH, HIDDEN = 32, 2, 64
SHAPE = SEQUENCE, BATCH, HIDDEN
NBYTES = 4 * SEQUENCE * BATCH * HIDDEN


class Skip(Exception):  # noqa: N818 - not an error
    """This check says nothing with this version of Megatron."""


def layout(tp, pp, vpp=None):
    """Set the parallel sizes that a check wants.

    Args:
        tp: Tensor-parallel ranks.
        pp: Pipeline stages.
        vpp: Virtual stages, or None.
    """

    def mark(check):
        check.layout = tp, pp, vpp
        return check

    return mark


def config_of(**more):
    """Make a config for the parallel sizes of now."""
    vpp = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    common = {
        "num_layers": 4,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": vpp,
        "pipeline_dtype": torch.float32,
        "deallocate_pipeline_outputs": True,
    }
    return TransformerConfig(**{**common, **more})


class Stage(nn.Module):
    """As much of a Megatron model as its schedules ask for, around any body.

    Args:
        config: Of Megatron.
        body: Called with what the stage before has sent, or with the data.
        chunk: Virtual stage, or None.
    """

    def __init__(self, config, body, chunk=None):
        super().__init__()
        self.config, self.body, self.vp_stage = config, body, chunk
        self.model_type = ModelType.encoder_or_decoder
        self.received = None
        self.num_forwards = 0
        self.after_forward = settle

    def set_input_tensor(self, tensors):
        self.received = tensors[0] if isinstance(tensors, list | tuple) else tensors

    def forward(self, data):
        self.num_forwards += 1
        output = self.body(data if self.received is None else self.received)
        self.after_forward()
        return output


def settle():
    """Wait until all that forward saved is stored, so that backward must load it."""
    offload = enabled()
    if offload is not None and offload.offloader is not None:
        offload.offloader.cache._queue.wait_idle()


class Mlp(nn.Module):
    """A body whose saves are all activations, and whose output is no view: a schedule would refuse to empty one."""

    def __init__(self, *, ends_in_tanh=False):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)
        self._last = torch.tanh if ends_in_tanh else nn.Identity()

    def forward(self, x):
        return self._last(x + self.down(F.gelu(self.up(x))))


def seed_all(offset=0):
    torch.manual_seed(SEED + offset)
    model_parallel_cuda_manual_seed(SEED + offset, force_reset_rng=True)


def batches(shape=SHAPE):
    """Yield inputs without end, the same for every run; they want a gradient, as a stage's input does."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        yield torch.randn(shape, generator=generator).requires_grad_()


def loss_of(output, non_loss_data=False):
    if non_loss_data:
        return {"sum": output.detach().sum(), "sizes": tuple(output.shape)}
    loss = output.float().square().mean()
    return loss, {"loss": loss.detach().clone()}


def forward_step(data, model):
    return model(next(data)), loss_of


class Run:
    """Trains chunks under Megatron's schedule.

    Args:
        chunks: One stage, or one for each virtual stage.
        schedule: In place of the one that Megatron picks.

    Attributes:
        found: Losses and gradients of every step.
    """

    def __init__(self, *chunks, schedule=None):
        self.chunks = chunks
        self.found = []
        data = [batches() for _ in chunks]
        self._schedule = partial(
            schedule or get_forward_backward_func(),
            forward_step_func=forward_step,
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            data_iterator=data if len(chunks) > 1 else data[0],
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
        )

    def call(self, **more):
        """Call the schedule; what it returns."""
        return self._schedule(**{"num_microbatches": MICROBATCHES, **more})

    def step(self, **more):
        """Train one step, remember losses and gradients, update, and return the losses."""
        losses = self.call(**more)
        gradients = [parameter.grad for chunk in self.chunks for parameter in chunk.parameters()]
        self.found.append((losses, [None if grad is None else grad.clone() for grad in gradients]))
        self.update()
        return losses

    def update(self, rate=0.05):
        with torch.no_grad():
            for chunk in self.chunks:
                for parameter in chunk.parameters():
                    if parameter.grad is not None:
                        parameter -= rate * parameter.grad
                    parameter.grad = None

    def steps(self, count=STEPS):
        for _ in range(count):
            self.step()
        return self.found


@contextlib.contextmanager
def plugin(directory, **options):
    """Offload inside of the context, everything above a KiB, and leave nothing."""
    tier = Path(directory) / "tier"
    tier.mkdir(exist_ok=True)
    common = {"paths": str(tier), "policy": "all", "min_tensor_bytes": 1024, "stats_path": str(directory)}
    offload = enable(common | options)
    try:
        yield offload
        if offload.offloader is not None:
            assert_nothing_held(offload.offloader)
            offload.offloader.report()  # ends a step that no following one has ended
    finally:
        offload.disable()
    assert list(tier.iterdir()) == []


def assert_nothing_held(offloader):
    gc.collect()
    offloader.cache._queue.wait_idle()
    assert offloader.cache.is_idle()
    assert offloader.cache.live_bytes == 0
    offloader.cache._queue.wait_idle()
    assert [tier.used_bytes for tier in offloader._tiers.values()] == [0] * len(offloader._tiers)


def steps_of(directory):
    """Read the books of this rank: one entry a step."""
    path = Path(directory) / f"rank{torch.distributed.get_rank()}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def compare(run, directory, *, steps=STEPS, stores=True, **options):
    """Run without and with the plugin; assert equality of every bit, and that something was offloaded.

    Args:
        run: Called with None, then with what :func:`enable` gave; returns anything of tensors.
        directory: For the tier and the books.
        steps: That are in the books then.
        stores: Whether bytes are stored in each step; None if a step may be given up before.
        **options: Of the plugin.

    Returns:
        What the run without the plugin has found, and the books.
    """
    seed_all()
    plain = run(None)
    with plugin(directory, **options) as offload:
        seed_all()
        ours = run(offload)
        assert_same(ours, plain)
    books = steps_of(directory)
    assert len(books) == steps, f"{len(books)} steps in the books, expected {steps}"
    assert stores is None or all((step["stored_bytes"] > 0) == stores for step in books), books
    assert stores is False or any(step["loaded_bytes"] for step in books), books
    assert not any(step["failures"] for step in books)
    return plain, books


def assert_same(ours, plain, what="result"):
    """Equal in structure and in every bit."""
    assert type(ours) is type(plain), what
    if isinstance(plain, torch.Tensor):
        assert ours.dtype == plain.dtype, what
        assert torch.equal(ours, plain), what
    elif isinstance(plain, dict):
        assert_same(list(ours.items()), list(plain.items()), what)
    elif isinstance(plain, list | tuple):
        assert len(ours) == len(plain), what
        for index, (one, other) in enumerate(zip(ours, plain, strict=True)):
            assert_same(one, other, f"{what}[{index}]")
    else:
        assert ours == plain, what
