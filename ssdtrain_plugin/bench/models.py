"""The models and the text of the end-to-end benchmarks: stacks of equal layers, trained on Python's library.

Three families, as SSDTrain measures them: ``gpt`` predicts the next token, ``bert`` those that
are masked, ``t5`` the continuation of a text that its encoder has read.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional
import torch.utils.checkpoint
from torch import Tensor, nn

__all__ = [
    "FAMILIES",
    "VOCABULARY",
    "CallLayer",
    "Decoder",
    "DecoderShape",
    "Encoder",
    "EncoderDecoder",
    "call_layer",
    "create_stack",
    "library_text",
    "recompute_core",
    "recompute_layer",
]

VOCABULARY = 256
"""Tokens are bytes."""

FAMILIES = ("gpt", "bert", "t5")
"""Kinds of stacks."""

CallLayer = Callable[..., Tensor]
"""Runs a layer, or any function of tensors, on its inputs; where a benchmark puts recomputation."""

_MASKED = 0  # no source of Python holds this byte
_MASKED_EVERY = 7  # about 15 %, as in BERT
_IGNORED = -100  # what torch's cross entropy leaves out


def call_layer(layer: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Run a layer and let autograd save what it wants.

    Args:
        layer: One of a stack's.
        *inputs: Its hidden state; for a decoder with cross-attention also the encoder's output.
    """
    return layer(*inputs)


def recompute_layer(layer: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Run a layer, save its inputs alone, and run it again in backward, as ``torch.utils.checkpoint`` does.

    Args:
        layer: One of a stack's.
        *inputs: As for :func:`call_layer`.
    """
    output: Tensor = torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False)
    return output


def recompute_core(layer: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Run a layer and recompute the core of its attention alone (arXiv 2205.05198, section 5).

    Args:
        layer: One of a stack's.
        *inputs: As for :func:`call_layer`.
    """
    return layer(*inputs, run_core=recompute_layer)


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes and type of a stack and of its micro-batch.

    Attributes:
        layers: Equal transformer layers; of ``t5`` the encoder's and the decoder's together, of
            which half, rounded down, decode.
        hidden: Width of the residual stream; a multiple of ``heads``.
        heads: Attention heads.
        sequence: Tokens of one sequence.
        microbatch: Sequences of one micro-batch.
        dtype: Name of torch's type of weights and activations.
        family: One of :data:`FAMILIES`.
        attention: ``flash`` is torch's fused one, ``naive`` saves the scores.
    """

    layers: int = 12
    hidden: int = 512
    heads: int = 8
    sequence: int = 512
    microbatch: int = 3
    dtype: str = "float32"
    family: str = "gpt"
    attention: str = "flash"

    def __post_init__(self) -> None:
        """Refuse what no stack can have.

        Raises:
            ValueError: A size is below 1, ``hidden`` is no multiple of ``heads``, ``dtype`` is no
                floating type, or there is no such family or attention.
        """
        sizes = (self.layers, self.hidden, self.heads, self.sequence, self.microbatch)
        if not all(isinstance(size, int) and size >= 1 for size in sizes) or self.hidden % self.heads:
            raise ValueError(f"{self} (expected whole sizes of at least 1, and `hidden` a multiple of `heads`)")
        if self.torch_dtype is None or not self.torch_dtype.is_floating_point:
            raise ValueError(f"dtype {self.dtype!r} (expected for example float32 or bfloat16)")
        if self.family not in FAMILIES or (self.family == "t5" and self.layers < 2):
            raise ValueError(
                f"family {self.family!r} of {self.layers} layers (expected gpt, bert, or t5 of 2 and more)"
            )
        if self.attention not in _CORES:
            raise ValueError(f"attention {self.attention!r} (expected {' or '.join(_CORES)})")

    @property
    def row_tokens(self) -> int:
        """Tokens of one row of a micro-batch, what is to be predicted included."""
        return (2 if self.family == "t5" else 1) * self.sequence + 1

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The type itself; None if there is no such one."""
        found = getattr(torch, str(self.dtype), None)
        return found if isinstance(found, torch.dtype) else None


def _flash(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


def _naive(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if is_causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    mixed: Tensor = scores.softmax(dim=-1) @ value
    return mixed


_CORES: dict[str, CallLayer] = {"flash": _flash, "naive": _naive}


class _Attention(nn.Module):
    """Queries of one sequence over keys and values of the same or another one; its norm and residual are outside."""

    def __init__(self, shape: DecoderShape, *, is_causal: bool, is_cross: bool = False) -> None:
        super().__init__()
        self.heads, self.is_cross = shape.heads, is_cross
        self._core = partial(_CORES[shape.attention], is_causal=is_causal)
        width = shape.hidden
        if is_cross:
            self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        else:
            self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, hidden: Tensor, memory: Tensor | None, run_core: CallLayer) -> Tensor:
        if memory is None:
            query, key, value = self._heads_of(self.query_key_value(hidden), 3)
        else:
            (query,), (key, value) = self._heads_of(self.query(hidden), 1), self._heads_of(self.key_value(memory), 2)
        mixed = run_core(self._core, query, key, value).transpose(1, 2).reshape(hidden.shape)
        output: Tensor = self.output(mixed)
        return output

    def _heads_of(self, projected: Tensor, count: int) -> list[Tensor]:
        batch, sequence, width = projected.shape
        parts = projected.view(batch, sequence, count, self.heads, width // count // self.heads)
        return [part.squeeze(2).transpose(1, 2) for part in parts.split(1, dim=2)]


class _Layer(nn.Module):
    """Attention and a GELU MLP of four times the width, each behind a LayerNorm and beside the residual."""

    def __init__(self, shape: DecoderShape, *, is_causal: bool, has_memory: bool = False) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.hidden)
        self.attention = _Attention(shape, is_causal=is_causal)
        if has_memory:
            self.cross_norm = nn.LayerNorm(shape.hidden)
            self.cross_attention = _Attention(shape, is_causal=False, is_cross=True)
        self.mlp_norm = nn.LayerNorm(shape.hidden)
        self.mlp_up = nn.Linear(shape.hidden, 4 * shape.hidden)
        self.mlp_down = nn.Linear(4 * shape.hidden, shape.hidden)

    def forward(self, hidden: Tensor, memory: Tensor | None = None, *, run_core: CallLayer = call_layer) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), None, run_core)
        if memory is not None:
            hidden = hidden + self.cross_attention(self.cross_norm(hidden), memory, run_core)
        inner = torch.nn.functional.gelu(self.mlp_up(self.mlp_norm(hidden)))
        output: Tensor = hidden + self.mlp_down(inner)
        return output


class _Stack(nn.Module):
    """What the families share: embeddings before, a norm, a head and the loss after the layers."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, shape.hidden)
        self.position_embedding = nn.Embedding(shape.sequence, shape.hidden)

    def _add_head(self, shape: DecoderShape) -> None:
        self.final_norm = nn.LayerNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, VOCABULARY, bias=False)

    def _embed(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        embedded: Tensor = self.token_embedding(tokens) + self.position_embedding(positions)
        return embedded

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.final_norm(hidden)).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)


class Decoder(_Stack):
    """A decoder of equal layers, with its loss inside, so that the plugin sees all that is saved.

    Args:
        shape: Its sizes.
    """

    def __init__(self, shape: DecoderShape) -> None:
        """Draw the weights from torch's default generator."""
        super().__init__(shape)
        self.layers = nn.ModuleList(_Layer(shape, is_causal=True) for _ in range(shape.layers))
        self._add_head(shape)

    def forward(self, tokens: Tensor, run_layer: CallLayer = call_layer) -> Tensor:
        """Predict each token from those before it.

        Args:
            tokens: (microbatch, sequence + 1), int64, on the device of the weights.
            run_layer: Calls each layer.

        Returns:
            The mean cross entropy, a scalar of float32.
        """
        hidden = self._embed(tokens[:, :-1].clone())  # or the whole rows would be saved
        for layer in self.layers:
            hidden = run_layer(layer, hidden)
        return self._loss(hidden, tokens[:, 1:].clone())


class Encoder(_Stack):
    """An encoder of equal layers that fills in masked tokens, with its loss inside.

    Args:
        shape: Its sizes.
    """

    def __init__(self, shape: DecoderShape) -> None:
        """Draw the weights from torch's default generator."""
        super().__init__(shape)
        self.layers = nn.ModuleList(_Layer(shape, is_causal=False) for _ in range(shape.layers))
        self._add_head(shape)

    def forward(self, tokens: Tensor, run_layer: CallLayer = call_layer) -> Tensor:
        """Predict each masked token from all others.

        Args:
            tokens: (microbatch, sequence + 1), int64, on the device of the weights; the last one
                of a row is not used.
            run_layer: Calls each layer.

        Returns:
            The mean cross entropy over the masked tokens, a scalar of float32.
        """
        inputs = tokens[:, :-1]
        is_masked = torch.arange(inputs.shape[1], device=inputs.device) % _MASKED_EVERY == 0
        hidden = self._embed(inputs.masked_fill(is_masked, _MASKED))
        for layer in self.layers:
            hidden = run_layer(layer, hidden)
        return self._loss(hidden, inputs.masked_fill(~is_masked, _IGNORED))


class EncoderDecoder(_Stack):
    """An encoder, and a decoder whose layers also attend to the encoder's output; with its loss inside.

    Args:
        shape: Its sizes.
    """

    def __init__(self, shape: DecoderShape) -> None:
        """Draw the weights from torch's default generator."""
        super().__init__(shape)
        num_decoder_layers = shape.layers // 2
        self.encoder = nn.ModuleList(_Layer(shape, is_causal=False) for _ in range(shape.layers - num_decoder_layers))
        self.memory_norm = nn.LayerNorm(shape.hidden)
        self.decoder = nn.ModuleList(_Layer(shape, is_causal=True, has_memory=True) for _ in range(num_decoder_layers))
        self._add_head(shape)

    def forward(self, tokens: Tensor, run_layer: CallLayer = call_layer) -> Tensor:
        """Read the first half of each row and predict the tokens of the second.

        Args:
            tokens: (microbatch, 2 * sequence + 1), int64, on the device of the weights.
            run_layer: Calls each layer.

        Returns:
            The mean cross entropy, a scalar of float32.
        """
        sequence = tokens.shape[1] // 2
        memory = self._embed(tokens[:, :sequence].clone())
        for layer in self.encoder:
            memory = run_layer(layer, memory)
        memory = self.memory_norm(memory)
        hidden = self._embed(tokens[:, sequence:-1].clone())
        for layer in self.decoder:
            hidden = run_layer(layer, hidden, memory)
        return self._loss(hidden, tokens[:, sequence + 1 :].clone())


def create_stack(shape: DecoderShape) -> nn.Module:
    """Make the stack of a family, its weights drawn from torch's default generator.

    Args:
        shape: Its sizes and family.
    """
    kinds: dict[str, type[Decoder | Encoder | EncoderDecoder]] = {
        "gpt": Decoder,
        "bert": Encoder,
        "t5": EncoderDecoder,
    }
    return kinds[shape.family](shape)


def library_text(num_tokens: int) -> Tensor:
    """Read the sources of Python's standard library as tokens.

    Args:
        num_tokens: How many; what is read starts again from the front when it ends.

    Returns:
        (num_tokens,), int64, each below :data:`VOCABULARY`. Equal for equal versions of Python.

    Raises:
        FileNotFoundError: The library has no sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= num_tokens:
            break
    if not text:
        raise FileNotFoundError(f"cannot read a text to train on: no *.py in `{folder}`")
    while len(text) < num_tokens:
        text += text[: num_tokens - len(text)]
    return torch.frombuffer(text, dtype=torch.uint8, count=num_tokens).long()
