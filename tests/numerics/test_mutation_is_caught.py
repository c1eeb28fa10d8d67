"""A tensor changed in place after it was saved raises at unpack, wherever its bytes are by then.

Hooks switch off autograd's own check, so without ours the gradient would be silently wrong.
"""

import pytest
import torch
from fakes import CacheRig, GatedTier, MemoryTier
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import ssdtrain_plugin as ssdtrain
from ssdtrain_plugin.errors import SavedTensorMutatedError

MUTATIONS = {
    "itself": lambda y: y.add_(1),
    "a view": lambda y: y[1:].mul_(2),
    "a view of a view": lambda y: y.view(-1)[3:].view(-1).fill_(0),
    "a detached alias": lambda y: y.detach().add_(1),
    "out=": lambda y: torch.add(y.detach(), 1, out=y.detach()),
    "an element": lambda y: y.detach().__setitem__((0, 0), 5.0),
    "copy_": lambda y: y.detach().copy_(torch.zeros_like(y)),
}


def saved_by_exp(rig, *, is_dropped=False):
    """A loss whose backward needs ``y``, and ``y``."""
    x = torch.randn(16, 16, requires_grad=True)
    with saved_tensors_hooks(rig.cache.put, rig.cache.get):
        y = (x * 1).exp()
        loss = (y * 3).sum()
    return loss, y


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=list(MUTATIONS))
@pytest.mark.parametrize("where", ["kept", "storing", "queued", "stored", "held again"])
def test_mutation_raises_wherever_the_bytes_are(where, mutate):
    tier = GatedTier(writes_open=where in ("kept", "stored", "held again"))
    with CacheRig(tier, min_tensor_bytes=1 << 30 if where == "kept" else 1) as rig:
        if where == "queued":  # behind another one that stands at the gate
            ahead = rig.cache.put(torch.randn(4))
            tier.writes.wait_for_arrival()
        loss, y = saved_by_exp(rig)
        if where == "storing":
            tier.writes.wait_for_arrival()
        if where in ("stored", "held again"):
            rig.settle()
        if where == "held again":
            rig.cache.expect_backward(0)
        mutate(y)
        if where == "storing":
            tier.writes.open()  # the changed bytes are what reaches the tier
            rig.settle()
        with pytest.raises(SavedTensorMutatedError, match=r"modified in place: \(16, 16\) torch.float32") as caught:
            loss.backward()
        assert "hint:" in str(caught.value)
        if where == "queued":
            del ahead


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=list(MUTATIONS))
def test_mutation_while_loading_raises(mutate):
    tier = GatedTier(reads_open=False)
    with CacheRig(tier) as rig:
        x = torch.randn(16, 16, requires_grad=True)
        with saved_tensors_hooks(rig.cache.put, rig.cache.get):
            y = (x * 1).exp()
            loss = (y * 3).sum()
        rig.settle()
        y.detach_()
        storage = y.untyped_storage()
        kept = y.clone()
        y.data = torch.empty(0)  # the user's name stays, the bytes go
        del storage
        rig.cache.expect_backward(0)
        tier.reads.wait_for_arrival()
        y.data = kept
        mutate(y)
        tier.reads.open()
        with pytest.raises(SavedTensorMutatedError):
            loss.backward()


def test_bytes_are_gone_and_the_name_is_changed_in_place():
    """The user still holds the tensor object, not its bytes: the version still counts."""
    with CacheRig(MemoryTier()) as rig:
        loss, y = saved_by_exp(rig)
        rig.settle()
        y.detach().zero_()
        del y
        with pytest.raises(SavedTensorMutatedError):
            loss.backward()


@pytest.mark.parametrize("policy", ["all", "none"])
@pytest.mark.parametrize("kind", ["weight", "view of a weight", "buffer", "input"])
def test_weights_and_inputs_changed_between_forward_and_backward(kind, policy, make_config):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("scale", torch.ones(8))

        def forward(self, x):
            return torch.exp(self.linear(x) * self.scale) @ self.linear.weight.t()

    model, x = Model(), torch.randn(4, 8)
    config = make_config("ssd") if policy == "all" else make_config("none")
    with ssdtrain.attach(model, config):
        loss = model(x).sum()
        with torch.no_grad():
            changed = {
                "weight": model.linear.weight,
                "view of a weight": model.linear.weight[1:],
                "buffer": model.scale,
                "input": x,
            }
            changed[kind].mul_(2)
        with pytest.raises(SavedTensorMutatedError, match="modified in place"):
            loss.backward()


def test_the_error_is_a_runtime_error_as_autograds_own():
    assert issubclass(SavedTensorMutatedError, RuntimeError)


def test_a_change_that_backward_does_not_need_is_legal():
    """Two versions of one storage are saved; backward needs the second only."""
    outcomes = []
    for rig in (None, CacheRig(MemoryTier())):
        x = torch.arange(6.0).view(2, 3).requires_grad_()
        if rig is None:
            y = (x * 1).exp()
            first = y.sin()
            y.mul_(2)
            second = y.cos()
        else:
            with rig, saved_tensors_hooks(rig.cache.put, rig.cache.get):
                y = (x * 1).exp()
                first = y.sin()
                rig.settle()
                y.mul_(2)
                second = y.cos()
                rig.settle()
                outcomes.append(torch.autograd.grad(second.sum(), y, retain_graph=True)[0])
                with pytest.raises(SavedTensorMutatedError):
                    first.sum().backward()
            continue
        outcomes.append(torch.autograd.grad(second.sum(), y, retain_graph=True)[0])
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            first.sum().backward()
    assert torch.equal(*outcomes)


def test_bytes_under_another_counter_are_not_mistaken_for_known_ones():
    """Dedup must compare version counters, not only version numbers.

    1. ``unsafe_chunk`` gives chunks of one storage with a counter each.
    2. The first is changed in place and saved at its version 1, the whole storage is stored.
    3. The second is changed in place to *its* version 1 and saved: other bytes by now.
    """
    gradients = []
    for rig in (None, CacheRig(MemoryTier())):
        x = torch.linspace(-1, 1, 32).view(2, 16).requires_grad_()

        def forward(x, settle):
            a, b = torch.unsafe_chunk(x * 1, 2, 1)
            a = a.sigmoid_()
            settle()
            b = b.sigmoid_()
            settle()
            return (a * 2).sum() + (b * 3).sum()

        if rig is None:
            forward(x, lambda: None).backward()
        else:
            with rig:
                with saved_tensors_hooks(rig.cache.put, rig.cache.get):
                    loss = forward(x, rig.settle)
                loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_data_alias_saved_after_a_change_has_its_own_bytes():
    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x)
            return weight.sum()

        @staticmethod
        def backward(ctx, gradient):
            return None, ctx.saved_tensors[0] * gradient

    weight, scratch = torch.ones(8, requires_grad=True), torch.zeros(8)
    with CacheRig(MemoryTier()) as rig:
        with saved_tensors_hooks(rig.cache.put, rig.cache.get):
            Save.apply(scratch.data, weight)
            rig.settle()
            kept = Save.apply(scratch.data, weight)
            rig.settle()
            scratch.add_(7)
            loss = Save.apply(scratch.data, weight)
            rig.settle()
        del scratch
        loss.backward()
        del kept
    assert torch.equal(weight.grad, torch.full((8,), 7.0))
