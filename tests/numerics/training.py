"""Train a workload with and without the plugin, and compare to the last bit."""

import torch

from ssdtrain_plugin.runtime import attach_with

SEED = 77
MIB = 1 << 20

CONFIGS = {
    "ssd": {"paths": True, "min_tensor_bytes": 1},
    "ssd, large only": {"paths": True, "min_tensor_bytes": 1024},
    "ssd, no room": {"paths": True, "min_tensor_bytes": 1, "prefetch_bytes": 1, "max_inflight_bytes": 1},
    "ssd, one thread": {"paths": True, "min_tensor_bytes": 1, "io_threads": 1, "prefetch_bytes": 4096},
    "half": {"paths": True, "min_tensor_bytes": 1, "policy": "fraction", "offload_fraction": 0.5},
    "host": {"host_bytes": 64 * MIB, "min_tensor_bytes": 1},
    "host, then ssd": {"paths": True, "host_bytes": 64 * 1024, "min_tensor_bytes": 1},
    "adaptive": {"paths": True, "min_tensor_bytes": 1, "policy": "adaptive"},
    "adaptive, host and ssd": {"paths": True, "host_bytes": MIB, "min_tensor_bytes": 1, "policy": "adaptive"},
    "none": {"policy": "none"},
}


def settle(offloader):
    """Return when all that forward saved has reached its tier, so that backward must load."""
    offloader.cache._queue.wait_idle()


def used_bytes(offloader):
    return sum(tier.used_bytes for tier in offloader._tiers.values())


def assert_nothing_held(offloader):
    settle(offloader)
    assert offloader.cache.is_idle()
    assert offloader.cache.live_bytes == 0
    settle(offloader)
    assert used_bytes(offloader) == 0


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same(ours, plain, what=""):
    """Equal in structure, dtype, shape and every bit."""
    assert type(ours) is type(plain), what
    if isinstance(plain, dict):
        assert ours.keys() == plain.keys(), what
        for name in plain:
            assert_same(ours[name], plain[name], f"{what}.{name}")
    elif isinstance(plain, list | tuple):
        assert len(ours) == len(plain), what
        for index, (a, b) in enumerate(zip(ours, plain, strict=True)):
            assert_same(a, b, f"{what}[{index}]")
    elif isinstance(plain, torch.Tensor):
        assert ours.dtype == plain.dtype, what
        assert ours.shape == plain.shape, what
        if plain.layout is not torch.strided:
            ours, plain = ours.to_dense(), plain.to_dense()
        bits_a, bits_b = (torch.view_as_real(t) if t.is_complex() else t for t in (ours, plain))
        assert torch.equal(bits_a, bits_b), f"{what} differs by {(bits_a - bits_b).abs().max()}"
        assert not bits_a.isnan().any() if bits_a.is_floating_point() else True, f"{what}: the test is vacuous"
    else:
        assert ours == plain, what


def one_step(model, workload, number, offloader, *, must_load):
    torch.manual_seed(SEED + number)
    with workload.precision():
        loss = model(*workload.batch(number))
    if offloader is not None and must_load:
        settle(offloader)
    loss.backward()
    return loss


def train(workload, config=None, *, steps=3, must_load=False, step=one_step, parts=None):
    """Train a fresh model; return losses, every gradient and the parameters, and the steps' statistics."""
    model = workload.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    offloader = None if config is None else attach_with(model, config, parts)
    losses, every_gradient, parameters, stats = [], [], [], []
    try:
        for number in range(steps):
            losses.append(step(model, workload, number, offloader, must_load=must_load).detach().clone())
            every_gradient.append(gradients(model))
            optimizer.step()
            optimizer.zero_grad()
            parameters.append({name: p.detach().clone() for name, p in model.named_parameters()})
            if offloader is not None:
                stats.append(offloader.end_step())
                assert_nothing_held(offloader)
    finally:
        if offloader is not None:
            offloader.detach()
    return {"losses": losses, "gradients": every_gradient, "parameters": parameters}, stats
