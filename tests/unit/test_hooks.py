"""Hooks are on inside forward and nowhere else."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from fakes import CacheRig, MemoryTier
from torch import nn

from ssdtrain_plugin.hooks import ModuleHooks, SavedTensorHooks, active_hooks, checkpoint


@pytest.fixture
def rig():
    with CacheRig(MemoryTier()) as rig:
        yield rig


@pytest.fixture
def hooks(rig):
    return SavedTensorHooks(rig.cache, checkpointing="offload")


def is_hooked():
    """Whether what autograd saves now is packed by somebody."""
    y = torch.ones(3, requires_grad=True).exp()
    return y.grad_fn._saved_result.data_ptr() != y.data_ptr() or active_hooks() is not None


def test_forward_numbers_micro_batches_and_leaves(hooks):
    with hooks.forward() as first:
        assert active_hooks() is hooks
    with hooks.forward() as second:
        pass
    assert second == first + 1
    assert active_hooks() is None
    assert not is_hooked()


def test_an_exception_leaves_the_context(hooks):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), hooks.forward():
            raise error
        assert active_hooks() is None
        assert not is_hooked()


def test_nothing_is_hooked_without_gradients_or_inside_another(hooks):
    with torch.no_grad(), hooks.forward() as number:
        assert number is None
        assert active_hooks() is None
    with hooks.forward() as outer, hooks.forward() as inner:
        assert outer is not None
        assert inner is None


def test_nothing_is_hooked_inside_backward(hooks):
    seen = []

    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            with torch.enable_grad(), hooks.forward() as number:
                seen.append(number)
            return gradient

    Inside.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert seen == [None]


def test_each_thread_has_its_own_context(hooks):
    seen = []
    with hooks.forward():
        thread = threading.Thread(target=lambda: seen.append(active_hooks()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_backward_announces_and_measures(hooks, rig):
    with hooks.forward() as number:
        loss = (torch.ones(8, requires_grad=True) * 2).exp().sum()
    rig.settle()
    with hooks.backward(number):
        rig.settle()
        assert rig.cache.live_bytes > 0
        loss.backward()
    with hooks.backward(None):
        pass
    assert rig.cache.end_step().backward_seconds > 0


def test_an_idle_cache_ends_its_step_at_the_next_forward(hooks):
    ended = []

    class Owner:
        def end_step(self):
            ended.append(hooks.cache.end_step())

    owner = Owner()
    hooks.end_step = weakref.WeakMethod(owner.end_step)
    with hooks.forward():  # the rig's own begin_forward counts as a step
        held = torch.ones(3, requires_grad=True).exp()
    assert len(ended) == 1
    with hooks.forward():
        pass
    assert len(ended) == 1, "something is alive"
    del held
    with hooks.forward():
        pass
    assert len(ended) == 2
    assert ended[1].microbatches == 2


def test_a_module_is_hooked_in_its_forward_only(hooks):
    seen = []

    class Model(nn.Linear):
        def forward(self, x):
            seen.append(active_hooks())
            return super().forward(x)

    model = Model(3, 3)
    module_hooks = ModuleHooks(model, hooks, None)
    model(torch.ones(2, 3))
    assert seen == [hooks]
    assert active_hooks() is None
    module_hooks.remove()
    module_hooks.remove()
    model(torch.ones(2, 3))
    assert seen == [hooks, None]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_hooks_of_the_user_run_inside(hooks):
    seen = []
    model = nn.Linear(3, 3)
    model.register_forward_pre_hook(lambda *_: seen.append(active_hooks()))
    model.register_forward_hook(lambda *_: seen.append(active_hooks()))
    module_hooks = ModuleHooks(model, hooks, None)
    model(torch.ones(2, 3))
    assert seen[0] is hooks
    module_hooks.remove()


def test_a_module_that_calls_itself_is_one_micro_batch(hooks, rig):
    class Recursive(nn.Linear):
        def forward(self, x, depth=2):
            return super().forward(x) if depth == 0 else self(x, depth - 1) + x

    model = Recursive(3, 3)
    module_hooks = ModuleHooks(model, hooks, None)
    rig.cache.end_step()
    model(torch.ones(2, 3)).sum().backward()
    assert rig.cache.end_step().microbatches == 1
    assert active_hooks() is None
    module_hooks.remove()


def test_an_interrupted_forward_is_left_at_the_next_one(hooks, rig):
    class Interrupted(nn.Linear):
        is_interrupted = True

        def forward(self, x):
            if self.is_interrupted:
                raise KeyboardInterrupt
            return super().forward(x)

    model = Interrupted(3, 3)
    module_hooks = ModuleHooks(model, hooks, None)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 3))
    model.is_interrupted = False
    rig.cache.end_step()
    model(torch.ones(2, 3)).sum().backward()
    assert rig.cache.end_step().microbatches == 1
    assert active_hooks() is None
    assert not is_hooked()
    module_hooks.remove()


def test_an_interrupted_forward_is_left_at_detach(hooks):
    class Interrupted(nn.Linear):
        def forward(self, x):
            raise KeyboardInterrupt

    model = Interrupted(3, 3)
    module_hooks = ModuleHooks(model, hooks, None)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 3))
    module_hooks.remove()
    assert active_hooks() is None
    assert not is_hooked()


def test_copies_and_pickles_of_a_model_are_not_attached(hooks):
    model = nn.Linear(3, 3)
    module_hooks = ModuleHooks(model, hooks, None)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(torch.ones(2, 3)).sum().backward()
        assert active_hooks() is None
    module_hooks.remove()
    gc.collect()


def test_checkpoint_runs_the_region_once_inside_and_twice_outside(hooks, rig):
    def count(context, how):
        calls = []

        def region(x, scale=1):
            calls.append(1)
            return (x * scale).exp()

        x = torch.ones(3, requires_grad=True)
        with context:
            y = checkpoint(region, x, scale=2, preserve_rng_state=False, **how)
        y.sum().backward()
        assert torch.equal(x.grad, 2 * torch.full((3,), 2.0).exp())
        return len(calls)

    import contextlib

    recompute = SavedTensorHooks(rig.cache, checkpointing="recompute")
    assert count(hooks.forward(), {}) == 1
    assert count(recompute.forward(), {}) == 2
    assert count(contextlib.nullcontext(), {}) == 2
