"""Small models whose saved tensors look like those of real ones. Each returns a scalar loss."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import nn

BATCH, SEQUENCE, HIDDEN, HEADS, VOCABULARY = 2, 8, 16, 2, 32


class Attention(nn.Module):
    """Fused projections: q, k, v are non-contiguous views of one storage."""

    def __init__(self, hidden=HIDDEN, heads=HEADS, dropout=0.0):
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.heads = heads
        self.dropout = dropout

    def forward(self, x, *, is_causal=False, mask=None):
        b, t, h = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, h // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(y.transpose(1, 2).reshape(b, t, h))


class CrossAttention(nn.Module):
    def __init__(self, hidden=HIDDEN, heads=HEADS):
        super().__init__()
        self.q = nn.Linear(hidden, hidden)
        self.kv = nn.Linear(hidden, 2 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.heads = heads

    def forward(self, x, memory):
        b, t, h = x.shape
        q = self.q(x).view(b, t, self.heads, -1).transpose(1, 2)
        k, v = self.kv(memory).view(b, memory.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, h))


class Mlp(nn.Module):
    def __init__(self, hidden=HIDDEN):
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class SwiGlu(nn.Module):
    """Both halves are views of one storage: the same shape and strides, another offset."""

    def __init__(self, halve, hidden=HIDDEN):
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 8 * hidden), nn.Linear(4 * hidden, hidden)
        self.halve = halve

    def forward(self, x):
        gate, value = self.halve(self.up(x))
        return self.down(F.silu(gate) * value)


class RmsNorm(nn.Module):
    def __init__(self, hidden=HIDDEN):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


class Block(nn.Module):
    def __init__(self, *, norm=nn.LayerNorm, mlp=Mlp, dropout=0.0, is_causal=True, is_post_norm=False):
        super().__init__()
        self.norm1, self.norm2 = norm(HIDDEN), norm(HIDDEN)
        self.attention, self.mlp = Attention(dropout=dropout), mlp()
        self.dropout = nn.Dropout(dropout)
        self.is_causal, self.is_post_norm = is_causal, is_post_norm

    def forward(self, x, mask=None):
        attend = partial(self.attention, is_causal=self.is_causal, mask=mask)
        if self.is_post_norm:
            x = self.norm1(x + self.dropout(attend(x)))
            return self.norm2(x + self.dropout(self.mlp(x)))
        x = x + self.dropout(attend(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Gpt(nn.Module):
    def __init__(self, *, layers=2, is_tied=False, run=None, **block):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.positions = nn.Parameter(torch.randn(1, SEQUENCE, HIDDEN) * 0.02)
        self.blocks = nn.ModuleList(Block(**block) for _ in range(layers))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        if is_tied:
            self.head.weight = self.tokens.weight
        self.run = run or (lambda block, x: block(x))

    def forward(self, tokens, targets):
        x = self.tokens(tokens) + self.positions[:, : tokens.shape[1]]
        for block in self.blocks:
            x = self.run(block, x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Bert(nn.Module):
    """Bidirectional, post-norm, key padding mask, loss on some positions only."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=0)
        self.blocks = nn.ModuleList(Block(is_causal=False, is_post_norm=True) for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, tokens, targets):
        mask = (tokens != 0)[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x, mask)
        is_masked = targets % 3 == 0
        return F.cross_entropy(self.head(x[is_masked]), targets[is_masked])


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.encoder, self.decoder = Block(is_causal=False), Block()
        self.cross = nn.ModuleList(CrossAttention() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, tokens, targets):
        memory = self.encoder(self.tokens(tokens))
        x = self.decoder(self.tokens(targets))
        for cross in self.cross:
            x = x + cross(self.norm(x), memory)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


class Stack(nn.Module):
    """Linear, something, linear: the something is what a test is about."""

    def __init__(self, middle, hidden=HIDDEN):
        super().__init__()
        self.first, self.last = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.middle = middle

    def forward(self, x, *rest):
        y = self.middle(self.first(x), self)
        return self.last(y).square().mean()


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 1)

    def forward(self, x, *rest):
        y = F.max_pool2d(F.relu(self.norm(self.conv1(x.unsqueeze(1)))), 2)
        y = self.norm(self.conv2(y))  # one module twice: its statistics change between
        return self.head(y.mean((2, 3))).square().mean()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)
        self.cell = nn.GRUCell(HIDDEN, HIDDEN)

    def forward(self, x, *rest):
        y, _ = self.lstm(x)
        state = torch.zeros_like(y[:, 0])
        for t in range(y.shape[1]):
            state = self.cell(y[:, t], state)
        return state.square().mean()


class Huge(nn.Module):
    """Saves small views of a huge storage, at an odd offset and with holes."""

    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(HIDDEN, 256 * HIDDEN)
        self.head = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x, *rest):
        wide = self.lift(x)
        row = wide[1, 3, 17 : 17 + HIDDEN]
        holes = wide[:, 2, 5::256]
        late = wide.as_strided((3, HIDDEN), (2 * HIDDEN, 2), wide.numel() - 6 * HIDDEN)
        return self.head(torch.sin(row)).sum() + holes.square().sum() + torch.exp(late).mean()


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.randn(5))
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x, *rest):
        index = torch.tensor([[0, 1, 3, 5, 7], [2, 0, 1, 4, 6]])
        matrix = torch.sparse_coo_tensor(index, self.values, (SEQUENCE, SEQUENCE), check_invariants=False).coalesce()
        return torch.sparse.mm(matrix, self.linear(x[0])).square().sum()


def _leaf_views(y, m):
    rows = m.first.weight[2:5, ::2]  # views of a weight are weights
    return y * rows.sum() + y @ m.first.weight.t()[:, :HIDDEN] + y * m.first.bias.expand_as(y)


def _expanded(y, m):
    column = y.mean(-1, keepdim=True).expand(-1, -1, HIDDEN)
    return torch.exp(column) * y * column


def _as_strided(y, m):
    windows = y.contiguous().as_strided((BATCH, SEQUENCE - 1, HIDDEN), (SEQUENCE * HIDDEN, HIDDEN, 1), 3)
    return torch.tanh(windows) * windows


def _complex(y, m):
    z = torch.fft.fft(y)
    w = z.conj() * z + torch.view_as_complex(torch.stack((y, y.flip(-1)), -1)).conj()
    return (w * w.conj()).real + w.conj().imag * y


def _bool_mask(y, m):
    return torch.where(y > 0, y.sin(), y.cos()).masked_fill(y.abs() > 1, 0.5) + y.clamp(-0.5, 0.5)


def _indices(y, m):
    order = y.detach().argsort(dim=1)
    return y.gather(1, order) * y[:, torch.arange(SEQUENCE).flip(0)] + y.sort(dim=-1).values.cumsum(-1)


def _zero_size(y, m):
    empty = y[:, :0]
    return torch.cat((torch.exp(empty), y.tanh(), empty.reshape(BATCH, 0, HIDDEN) * 2), 1)


def _detached_weight(y, m):
    return (y @ m.first.weight.detach()) * y + torch.exp(y) @ m.last.weight.data


def _overlapping(y, m):
    a, b, c = y.split([4, 4, 8], -1)
    joined = torch.cat((torch.sin(a) * b, c.tanh(), a.exp()), -1)
    return joined * torch.stack(y.unbind(1), 1) + y.transpose(0, 1).transpose(0, 1).exp()


def _in_place(y, m):
    y = y.clone()
    y.mul_(2).add_(1).sigmoid_()
    z = y * y
    z[:, 0] = 0.0
    z[..., ::2].mul_(y[..., ::2])
    return F.relu(z, inplace=True)


def _unfold_einsum(y, m):
    windows = y.unfold(1, 3, 2)
    return torch.einsum("btdw,bsd->bsd", windows, y) / (1 + y.logsumexp(-1, keepdim=True).exp())


def _softmax_dropout(y, m):
    return F.dropout(F.log_softmax(y, -1), 0.3) + F.alpha_dropout(y.softmax(1), 0.1, training=True)


def _float64(y, m):
    z = y.double()
    return ((z.exp() * z).float() + y.half().float().sin() * y).to(y.dtype)


_MIDDLES = {
    "views of leafs": _leaf_views,
    "expanded": _expanded,
    "as_strided": _as_strided,
    "complex and conj": _complex,
    "bool masks": _bool_mask,
    "int indices": _indices,
    "zero size": _zero_size,
    "detached weights": _detached_weight,
    "split, cat, unbind": _overlapping,
    "in-place, legal": _in_place,
    "unfold and einsum": _unfold_einsum,
    "softmax and dropout": _softmax_dropout,
    "several dtypes": _float64,
}


@dataclass(frozen=True)
class Workload:
    """A model, its batches, and the number format it trains in."""

    make: Callable[[], nn.Module]
    is_text: bool = True
    dtype: torch.dtype = torch.float32
    is_autocast: bool = False

    def build(self):
        torch.manual_seed(0)
        return self.make().to(self.dtype)

    def batch(self, number):
        generator = torch.Generator().manual_seed(1000 + number)
        if self.is_text:
            return tuple(torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=generator) for _ in range(2))
        return (torch.randn(BATCH, SEQUENCE, HIDDEN, generator=generator).to(self.dtype),)

    def precision(self):
        return torch.autocast("cpu", torch.bfloat16) if self.is_autocast else nullcontext()


def _chunk(x):
    return x.chunk(2, -1)


def _split(x):
    return x.split(x.shape[-1] // 2, -1)


def _narrow(x):
    half = x.shape[-1] // 2
    return x.narrow(-1, 0, half), x.narrow(-1, half, half)


WORKLOADS = {
    "gpt": Workload(Gpt),
    "gpt bf16": Workload(Gpt, dtype=torch.bfloat16),
    "gpt autocast": Workload(Gpt, is_autocast=True),
    "gpt tied": Workload(partial(Gpt, is_tied=True)),
    "gpt tied autocast": Workload(partial(Gpt, is_tied=True), is_autocast=True),
    "gpt dropout": Workload(partial(Gpt, dropout=0.2)),
    "gpt rmsnorm": Workload(partial(Gpt, norm=RmsNorm)),
    "gpt rmsnorm swiglu bf16": Workload(partial(Gpt, norm=RmsNorm, mlp=partial(SwiGlu, _chunk)), dtype=torch.bfloat16),
    "bert": Workload(Bert),
    "bert autocast": Workload(Bert, is_autocast=True),
    "encoder-decoder": Workload(EncoderDecoder),
    "encoder-decoder bf16": Workload(EncoderDecoder, dtype=torch.bfloat16),
    "swiglu chunk": Workload(partial(Gpt, mlp=partial(SwiGlu, _chunk))),
    "swiglu split": Workload(partial(Gpt, mlp=partial(SwiGlu, _split))),
    "swiglu narrow": Workload(partial(Gpt, mlp=partial(SwiGlu, _narrow))),
    "convolution": Workload(Convolution, is_text=False),
    "recurrent": Workload(Recurrent, is_text=False),
    "small views of a huge storage": Workload(Huge, is_text=False),
    "sparse": Workload(Sparse, is_text=False),
    **{name: Workload(partial(Stack, middle), is_text=False) for name, middle in _MIDDLES.items()},
}
