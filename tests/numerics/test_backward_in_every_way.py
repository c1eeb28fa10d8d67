"""Backward twice, in part, through itself, never, or after an exception: as without the plugin."""

import gc

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import nn
from training import assert_nothing_held, assert_same, gradients, settle
from workloads import BATCH, HIDDEN, SEQUENCE, WORKLOADS, Attention, Gpt, Mlp

import ssdtrain_plugin as ssdtrain

GPT = WORKLOADS["gpt"]


class TwoHeads(nn.Module):
    """A trunk with two outputs, and a value that both need."""

    def __init__(self):
        super().__init__()
        self.trunk, self.left, self.right = Mlp(), Attention(), Mlp()

    def forward(self, x):
        shared = torch.tanh(self.trunk(x))
        return self.left(shared) * shared, self.right(shared) * shared


def compare(run, config, make_model=TwoHeads):
    """Call ``run(model, settle_or_nothing)`` without and with the plugin and compare what it returns."""
    torch.manual_seed(0)
    plain = run(make_model(), lambda: None)
    torch.manual_seed(0)
    model = make_model()
    with ssdtrain.attach(model, config) as offloader:
        ours = run(model, lambda: settle(offloader))
        gc.collect()
        offloader.end_step()
        assert_nothing_held(offloader)
    assert_same(ours, plain)


def batch():
    return torch.randn(BATCH, SEQUENCE, HIDDEN, generator=torch.Generator().manual_seed(5))


def test_second_backward_over_a_retained_graph(config):
    def run(model, settled):
        left, right = model(batch())
        loss = left.sum() + right.square().sum()
        settled()
        found = []
        for retain in (True, True, False):
            loss.backward(retain_graph=retain)
            settled()
            found.append(gradients(model))
        return found

    compare(run, config)


def test_outputs_one_by_one_over_a_retained_graph(config):
    def run(model, settled):
        outputs = model(batch())
        settled()
        found = []
        for index, output in enumerate(outputs):
            output.backward(torch.ones_like(output), retain_graph=index == 0)
            found.append(gradients(model))
        return found

    compare(run, config)


def test_outputs_in_the_other_order(config):
    def run(model, settled):
        left, right = model(batch())
        settled()
        right.sum().backward(retain_graph=True)
        left.sum().backward()
        return gradients(model)

    compare(run, config)


def test_partial_gradients_twice(config):
    def run(model, settled):
        x = batch().requires_grad_()
        left, right = model(x)
        settled()
        found = []
        for _ in range(2):
            found.append(torch.autograd.grad(left.sum(), [x, model.left.out.weight], retain_graph=True))
            settled()
            found.append(torch.autograd.grad(right.sum(), list(model.right.parameters()), retain_graph=True))
        return found

    compare(run, config)


def test_double_backward(config):
    def run(model, settled):
        x = batch().requires_grad_()
        left, right = model(x)
        settled()
        (gradient,) = torch.autograd.grad((left.square() + right).sum(), x, create_graph=True)
        settled()
        penalty = gradient.square().sum()
        penalty.backward()
        return [gradient.detach(), x.grad, gradients(model)]

    class Smooth(TwoHeads):
        def __init__(self):
            super().__init__()
            self.left = Mlp()  # fused attention has no second derivative on the CPU

    compare(run, config, Smooth)


def test_double_backward_computed_inside_forward(config):
    class Energy(nn.Module):
        """Forces as a gradient: backward runs inside forward, while the hooks are on."""

        def __init__(self):
            super().__init__()
            self.body = Mlp()

        def forward(self, x):
            x = x.detach().requires_grad_()
            energy = torch.tanh(self.body(x)).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
            return energy + force.square().sum()

    def run(model, settled):
        loss = model(batch())
        settled()
        loss.backward()
        return gradients(model)

    compare(run, config, Energy)


def test_backward_never_run_frees_everything(config):
    def run(model, settled):
        outputs = model(batch())
        settled()
        del outputs
        return gradients(model)

    compare(run, config)


def test_only_one_branch_is_run_and_the_rest_dropped(config):
    def run(model, settled):
        left, right = model(batch())
        settled()
        left.sum().backward()
        del left, right
        return gradients(model)

    compare(run, config)


def test_exception_in_forward_leaves_nothing_and_the_next_step_is_right(config):
    class Fails(Gpt):
        def forward(self, tokens, targets):
            x = self.blocks[0](self.tokens(tokens))
            if self.training:
                raise ValueError("on purpose")
            return super().forward(tokens, targets) + 0 * x.sum()

    def run(model, settled):
        model.train()
        for _ in range(2):
            with pytest.raises(ValueError, match="on purpose"):
                model(*GPT.batch(0))
        model.eval()
        loss = model(*GPT.batch(0))
        outside = torch.ones(3, requires_grad=True).exp()
        assert outside.grad_fn._saved_result.data_ptr() == outside.data_ptr(), "hooks are still on"
        settled()
        loss.backward()
        return gradients(model)

    compare(run, config, Fails)


def test_hooks_are_off_outside_of_forward(make_config):
    model = TwoHeads()
    with ssdtrain.attach(model, make_config("ssd")) as offloader:
        model(batch())
        settle(offloader)
        offloader.end_step()
        x = torch.randn(64, 64, requires_grad=True)
        (x.exp() * x).sum().backward()
        assert offloader.end_step().stored_bytes == 0


def test_interrupt_in_forward_leaves_no_hook_on(make_config):
    """torch calls no forward hook for a KeyboardInterrupt, not even an `always_call` one."""

    class Interrupted(nn.Linear):
        def forward(self, x):
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), Interrupted(HIDDEN, HIDDEN))
    with ssdtrain.attach(model, make_config("ssd")) as offloader:
        with pytest.raises(KeyboardInterrupt):
            model(batch())
        model[1] = nn.Linear(HIDDEN, HIDDEN)
        offloader.end_step()
        model(batch()).sum().backward()
        settle(offloader)
        assert offloader.end_step().microbatches == 1
        x = torch.randn(64, 64, requires_grad=True)
        y = x.exp() * x
        settle(offloader)
        assert offloader.end_step().stored_bytes == 0
        del y
        assert_nothing_held(offloader)


def test_gradient_accumulation(config):
    def run(model, settled):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = []
        for step in range(3):
            optimizer.zero_grad()
            for part in range(3):
                loss = model(*GPT.batch(3 * step + part)) / 3
                settled()
                loss.backward()
            found.append(gradients(model))
            optimizer.step()
        return found

    compare(run, config, Gpt)


def test_accumulated_losses_and_one_backward(config):
    def run(model, settled):
        loss = sum(model(*GPT.batch(part)) for part in range(3))
        settled()
        loss.backward()
        return gradients(model)

    compare(run, config, Gpt)


def test_evaluation_between_steps_changes_nothing(config):
    def run(model, settled):
        found = []
        for number in range(2):
            with torch.no_grad():
                found.append(model(*GPT.batch(9)))
            with torch.inference_mode():
                found.append(model(*GPT.batch(8)).clone())
            loss = model(*GPT.batch(number))
            with torch.no_grad():
                found.append(model(*GPT.batch(7)))
            settled()
            loss.backward()
            found.append(gradients(model))
        return found

    compare(run, config, Gpt)


def test_model_called_twice_before_backward(config):
    def run(model, settled):
        a, b = model(batch()), model(batch().flip(1))
        settled()
        (a[0] * b[1]).sum().backward()
        return gradients(model)

    compare(run, config)


def test_custom_function_with_saved_outputs(config):
    class Sigmoid(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = 1 / (1 + torch.exp(-x))
            ctx.save_for_backward(x, y, None)
            return y

        @staticmethod
        def backward(ctx, gradient):
            x, y, nothing = ctx.saved_tensors
            assert nothing is None
            return gradient * y * (1 - y) + 0 * x

    class Custom(TwoHeads):
        def forward(self, x):
            return tuple(Sigmoid.apply(y) for y in super().forward(x))

    def run(model, settled):
        left, right = model(batch())
        settled()
        (left.sum() + right.sum()).backward()
        return gradients(model)

    compare(run, config, Custom)


def test_nested_attach_is_served_by_the_outer_one(make_config):
    torch.manual_seed(0)
    plain = TwoHeads()
    sum(y.sum() for y in plain(batch())).backward()
    torch.manual_seed(0)
    model = TwoHeads()
    with ssdtrain.attach(model, make_config("ssd")) as outer, ssdtrain.attach(model.left, make_config("ssd")) as inner:
        loss = sum(y.sum() for y in model(batch()))
        settle(outer)
        loss.backward()
        assert outer.end_step().stored_bytes > 0
        assert inner.end_step().stored_bytes == 0
        assert_nothing_held(outer)
        assert_nothing_held(inner)
    assert_same(gradients(model), gradients(plain))


def test_attach_and_detach_many_times(make_config):
    def run(model, settled):
        return [model(*GPT.batch(0)).backward(), gradients(model)]

    model = GPT.build()
    expected = run(model, None)
    for name in ("ssd", "host", "ssd, no room", "none"):
        model.zero_grad()
        with ssdtrain.attach(model, make_config(name)):
            assert_same(run(model, None), expected)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_offloader_that_nobody_keeps_still_offloads(make_config):
    """Finding F7: `ssdtrain.attach(model, config)` is the one line of the README."""
    model = TwoHeads()
    stored = []
    offloader = ssdtrain.attach(model, make_config("ssd"))
    end_step = offloader.cache.end_step
    queue = offloader.cache._queue
    del offloader
    gc.collect()
    left, right = model(batch())
    queue.wait_idle()
    (left.sum() + right.sum()).backward()
    stored.append(end_step())
    del model, left, right
    gc.collect()
    assert stored[0].failures == {}
    assert stored[0].stored_bytes > 0


def test_backward_after_detach_raises_and_does_not_hang(make_config):
    """Finding F3. The tier is closed, the bytes are gone: an error each time it is asked."""
    model = TwoHeads()
    offloader = ssdtrain.attach(model, make_config("ssd"))
    left, _ = model(batch())
    settle(offloader)
    offloader.detach()
    for _ in range(2):
        with pytest.raises(ssdtrain.OffloadError):
            left.sum().backward(retain_graph=True)


def test_saved_tensors_are_readable_at_their_nodes(make_config):
    class Exp(nn.Module):
        def forward(self, x):
            return (x * 2).exp()

    model = nn.Sequential(Exp())
    with ssdtrain.attach(model, make_config("ssd")) as offloader:
        x = torch.randn(8, 8, requires_grad=True)
        y = model(x)
        expected = y.detach().clone()
        node = y.grad_fn
        del y
        settle(offloader)
        assert torch.equal(node._saved_result, expected)
        assert torch.equal(node._saved_result, expected)
        del node
        gc.collect()
        offloader.end_step()
        assert_nothing_held(offloader)


def test_unpacked_tensors_have_the_dtype_shape_and_strides_they_had(make_config):
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            ctx.expected = (x.dtype, x.shape, x.stride(), x.storage_offset() % 1024, x.clone())
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            seen.append(((x.dtype, x.shape, x.stride(), x.storage_offset() % 1024, x.clone()), ctx.expected))
            return gradient

    class Views(nn.Module):
        def forward(self, x):
            wide = x.repeat(1, 64)
            views = (
                wide.t(), wide[3:5, 7::3], wide[:1, :9], wide.as_strided((5, 5), (1, 3), 11),
                wide.expand(2, *wide.shape), wide[-1, -1], wide.bfloat16()[1:, 1:], wide.double().t()[2:],
            )  # fmt: skip
            return sum(Watch.apply(view).float().sum() for view in views)

    model = nn.Sequential(Views())
    with ssdtrain.attach(model, make_config("ssd")) as offloader:
        x = torch.randn(16, 64, requires_grad=True)
        loss = model(x)
        settle(offloader)
        loss.backward()
    assert len(seen) == 8
    for (*ours, our_values), (*expected, expected_values) in seen:
        assert ours == expected
        assert torch.equal(our_values, expected_values)


def test_functional_call_with_other_weights(config):
    def run(model, settled):
        weights = {name: p.detach() * 2 for name, p in model.named_parameters()}
        weights = {name: w.requires_grad_() for name, w in weights.items()}
        left, right = torch.func.functional_call(model, weights, (batch(),))
        settled()
        return torch.autograd.grad((F.softmax(left, -1) * right).sum(), list(weights.values()))

    compare(run, config)
