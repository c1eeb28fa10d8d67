"""Bit-equal gradients and falling memory on a real device."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import nn

import ssdtrain_plugin as ssdtrain

GIB, HIDDEN, HEADS, LAYERS = 1 << 30, 512, 8, 6


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 8 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)
        self.dropout = dropout

    def forward(self, x):
        b, t, h = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, h // HEADS).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(b, t, h)), self.dropout)
        gate, value = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class Model(nn.Sequential):
    def __init__(self, dropout=0.1):
        super().__init__(*[Block(dropout) for _ in range(LAYERS)])

    def forward(self, x):
        return super().forward(x).float().square().mean()


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def train(device, dtype, config, *, is_autocast=False, steps=3):
    torch.manual_seed(0)
    model = Model().to(device, torch.float32 if is_autocast else dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    offloader = None if config is None else ssdtrain.attach(model, config)
    found, stats, peaks = [], [], []
    for step in range(steps):
        torch.manual_seed(step)
        x = torch.randn(8, 512, HIDDEN, device=device).to(torch.float32 if is_autocast else dtype)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype, enabled=is_autocast):
            loss = model(x)
        if offloader is not None and step == 1:
            offloader.cache._queue.wait_idle()  # in this step everything must be loaded
        loss.backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        found.append([loss.detach().clone(), *[p.grad.clone() for p in model.parameters()]])
        optimizer.step()
        optimizer.zero_grad()
        found.append([p.detach().clone() for p in model.parameters()])
        del loss
        if offloader is not None:
            stats.append(offloader.end_step())
            offloader.cache._queue.wait_idle()
            assert offloader.cache.is_idle()
            assert offloader.cache.live_bytes == 0
    if offloader is not None:
        offloader.detach()
    return found, stats, peaks


def options(kind, tmp_path, **changes):
    place = {"paths": [str(tmp_path)]} if kind == "ssd" else {"host_bytes": 4 * GIB}
    return ssdtrain.OffloadConfig(**(place | {"min_tensor_bytes": 4096} | changes))


@pytest.mark.parametrize("kind", ["ssd", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("is_autocast", [False, True], ids=["plain", "autocast"])
def test_training_is_bit_equal(device, tmp_path, kind, dtype, is_autocast):
    if is_autocast and dtype is torch.float32:
        pytest.skip("autocast to fp32 is no cast")
    expected, _, _ = train(device, dtype, None, is_autocast=is_autocast)
    again, _, _ = train(device, dtype, None, is_autocast=is_autocast)
    ours, stats, _ = train(device, dtype, options(kind, tmp_path), is_autocast=is_autocast)
    for plain, repeated, offloaded in zip(expected, again, ours, strict=True):
        for a, b, c in zip(plain, repeated, offloaded, strict=True):
            assert torch.equal(a, b), "the kernels are not deterministic here: nothing can be said"
            assert torch.equal(a, c)
    assert stats[1].loaded_bytes > 0


@pytest.mark.parametrize("kind", ["ssd", "host"])
def test_tight_budgets_are_bit_equal(device, tmp_path, kind):
    config = options(kind, tmp_path, prefetch_bytes=1, max_inflight_bytes=1)
    expected, _, _ = train(device, torch.bfloat16, None)
    ours, _, _ = train(device, torch.bfloat16, config)
    for plain, offloaded in zip(expected, ours, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, offloaded, strict=True))


@pytest.mark.parametrize("kind", ["ssd", "host"])
def test_the_peak_of_the_device_falls(device, tmp_path, kind):
    """Both the allocator's peak and our own account, in a step after the first."""
    small = {"max_inflight_bytes": 32 << 20, "prefetch_bytes": 32 << 20}
    _, _, plain = train(device, torch.float32, None)
    _, stats, ours = train(device, torch.float32, options(kind, tmp_path, **small))
    assert ours[-1] < 0.7 * plain[-1]
    assert stats[-1].peak_activation_bytes < 0.6 * stats[-1].saved_bytes


def test_retain_graph_and_mutation_on_the_device(device, tmp_path):
    model = nn.Linear(64, 64).to(device)
    with ssdtrain.attach(model, options("ssd", tmp_path, min_tensor_bytes=1)) as offloader:
        x = torch.randn(64, 64, device=device)
        loss = model(x).sum()
        offloader.cache._queue.wait_idle()
        loss.backward(retain_graph=True)
        first = model.weight.grad.clone()
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert torch.equal(model.weight.grad, first)
        x.add_(1)
        with pytest.raises(ssdtrain.SavedTensorMutatedError):
            loss.backward()
