"""Small models for DeepSpeed, and digests of what they learn."""

import hashlib
import os
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.activation_checkpointing.checkpointing import checkpoint as imported_checkpoint
from torch import nn
from torch.nn import functional

VOCABULARY, HIDDEN, SEQUENCE, ROWS = 32, 64, 32, 2


class Block(nn.Module):
    """Pre-norm feed-forward block; counts its forward calls and can run on a pair of tensors."""

    num_calls = 0

    def __init__(self, dropout, is_pair=False):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN)
        self.dropout = dropout
        self.is_pair = is_pair

    def forward(self, inputs):
        Block.num_calls += 1
        x, memory = inputs if self.is_pair else (inputs, None)
        x = x + functional.dropout(self.down(functional.gelu(self.up(self.norm(x)))), self.dropout, self.training)
        return (x, memory + torch.tanh(x)) if self.is_pair else x


class TrackedBlock(Block):
    """Draws its dropout from DeepSpeed's named random state, as tensor-parallel models do."""

    def forward(self, inputs):
        with deepspeed.checkpointing.get_cuda_rng_tracker().fork():
            return super().forward(inputs)


class Embedding(nn.Module):
    def __init__(self, is_pair=False):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.is_pair = is_pair

    def forward(self, tokens):
        x = self.tokens(tokens)
        return (x, x * 0.5) if self.is_pair else x


class Head(nn.Module):
    def __init__(self, is_pair=False):
        super().__init__()
        self.logits = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.is_pair = is_pair

    def forward(self, inputs):
        return self.logits(inputs[0] + inputs[1] if self.is_pair else inputs)


def loss_fn(logits, labels):
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


class PlainModel(nn.Module):
    """For the plain engine: computes its loss itself, and may checkpoint its blocks with DeepSpeed's function."""

    def __init__(self, num_blocks, dropout=0.0, checkpointing=None, is_tracked=False):
        super().__init__()
        self.embedding = Embedding()
        kind = TrackedBlock if is_tracked else Block
        self.blocks = nn.ModuleList(kind(dropout) for _ in range(num_blocks))
        self.head = Head()
        self.checkpointing = checkpointing

    def _run(self, block, x):
        if self.checkpointing in ("imported", "everything"):
            return imported_checkpoint(block, x)
        if self.checkpointing == "attribute":
            return deepspeed.checkpointing.checkpoint(block, x)
        if self.checkpointing == "non_reentrant":
            return deepspeed.checkpointing.non_reentrant_checkpoint(block, x)
        return block(x)

    def forward(self, tokens, labels):
        x = self._run(self.embedding, tokens) if self.checkpointing == "everything" else self.embedding(tokens)
        for block in self.blocks:
            x = self._run(block, x)
        return loss_fn(self.head(x), labels)


def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        text = torch.randint(VOCABULARY, (ROWS, SEQUENCE + 1), generator=generator)
        yield text[:, :-1].contiguous(), text[:, 1:].contiguous()


def _bytes_of(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class GradientDigest:
    """A hash of every gradient that every backward computes for every parameter, in order for each."""

    def __init__(self, model):
        self._hashes = {name: hashlib.sha256() for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda gradient, name=name: self._hashes[name].update(_bytes_of(gradient)))

    def hexdigest(self):
        return hashlib.sha256("".join(one.hexdigest() for _, one in sorted(self._hashes.items())).encode()).hexdigest()


def digest_of_parameters(model):
    result = hashlib.sha256()
    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")]):
        for parameter in parameters:
            result.update(_bytes_of(parameter))
    return result.hexdigest()


def open_extents(directory):
    """Inodes of the deleted files below a directory that this process holds open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            target, inode = os.readlink(link), os.stat(link).st_ino
        except OSError:
            continue
        if target.startswith(str(directory)) and target.endswith(" (deleted)"):
            found.append(inode)
    return found
