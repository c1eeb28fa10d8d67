"""The model and the text of the end-to-end benchmarks: a decoder of equal layers, trained on Python's library."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional
import torch.utils.checkpoint
from torch import Tensor, nn

__all__ = ["VOCABULARY", "CallLayer", "Decoder", "DecoderShape", "call_layer", "library_text", "recompute_layer"]

VOCABULARY = 256
"""Tokens are bytes."""

CallLayer = Callable[[nn.Module, Tensor], Tensor]
"""Runs one layer on its input; where a benchmark puts recomputation."""


def call_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Run a layer and let autograd save what it wants.

    Args:
        layer: One of :class:`Decoder`'s.
        hidden: Its input.
    """
    output: Tensor = layer(hidden)
    return output


def recompute_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Run a layer, save its input alone, and run it again in backward, as ``torch.utils.checkpoint`` does.

    Args:
        layer: One of :class:`Decoder`'s.
        hidden: Its input.
    """
    output: Tensor = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False)
    return output


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes and type of a decoder and of its micro-batch.

    Attributes:
        layers: Equal transformer layers.
        hidden: Width of the residual stream; a multiple of ``heads``.
        heads: Attention heads.
        sequence: Tokens of one sequence.
        microbatch: Sequences of one micro-batch.
        dtype: Name of torch's type of weights and activations.
    """

    layers: int = 12
    hidden: int = 512
    heads: int = 8
    sequence: int = 512
    microbatch: int = 3
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse what no decoder can have.

        Raises:
            ValueError: A size is below 1, ``hidden`` is no multiple of ``heads``, or ``dtype`` is
                no floating type.
        """
        sizes = (self.layers, self.hidden, self.heads, self.sequence, self.microbatch)
        if not all(isinstance(size, int) and size >= 1 for size in sizes) or self.hidden % self.heads:
            raise ValueError(f"{self} (expected whole sizes of at least 1, and `hidden` a multiple of `heads`)")
        if self.torch_dtype is None or not self.torch_dtype.is_floating_point:
            raise ValueError(f"dtype {self.dtype!r} (expected for example float32 or bfloat16)")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The type itself; None if there is no such one."""
        found = getattr(torch, str(self.dtype), None)
        return found if isinstance(found, torch.dtype) else None


class _Layer(nn.Module):
    """Attention and a GELU MLP of four times the width, each behind a LayerNorm and beside the residual."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(shape.hidden)
        self.query_key_value = nn.Linear(shape.hidden, 3 * shape.hidden)
        self.attention_output = nn.Linear(shape.hidden, shape.hidden)
        self.mlp_norm = nn.LayerNorm(shape.hidden)
        self.mlp_up = nn.Linear(shape.hidden, 4 * shape.hidden)
        self.mlp_down = nn.Linear(4 * shape.hidden, shape.hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention_output(self._attend(self.attention_norm(hidden)))
        inner = torch.nn.functional.gelu(self.mlp_up(self.mlp_norm(hidden)))
        output: Tensor = hidden + self.mlp_down(inner)
        return output

    def _attend(self, hidden: Tensor) -> Tensor:
        batch, sequence, width = hidden.shape
        parts = self.query_key_value(hidden).view(batch, sequence, 3, self.heads, width // self.heads)
        query, key, value = (part.squeeze(2).transpose(1, 2) for part in parts.split(1, dim=2))
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, sequence, width)


class Decoder(nn.Module):
    """A decoder of equal layers, with its loss inside, so that the plugin sees all that is saved.

    Args:
        shape: Its sizes.
    """

    def __init__(self, shape: DecoderShape) -> None:
        """Draw the weights from torch's default generator."""
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, shape.hidden)
        self.position_embedding = nn.Embedding(shape.sequence, shape.hidden)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.final_norm = nn.LayerNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, run_layer: CallLayer = call_layer) -> Tensor:
        """Predict each token from those before it.

        Args:
            tokens: (microbatch, sequence + 1), int64, on the device of the weights.
            run_layer: Calls each layer.

        Returns:
            The mean cross entropy, a scalar of float32.
        """
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        hidden: Tensor = self.token_embedding(inputs) + self.position_embedding(positions)
        for layer in self.layers:
            hidden = run_layer(layer, hidden)
        logits = self.head(self.final_norm(hidden)).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


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
