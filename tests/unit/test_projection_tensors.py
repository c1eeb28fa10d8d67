"""The list of saved tensors: against the formulas of papers, and against what torch saves."""

from collections import Counter

import pytest
import torch
from torch import nn

from ssdtrain_plugin.projection import cluster_from_dict, model_from_dict, stages_of
from ssdtrain_plugin.projection.model import Block
from ssdtrain_plugin.projection.tensors import Split, head_tensors, layer_tensors, total_bytes

S, B, H, A, V = 128, 2, 256, 8, 1000
SBH = S * B * H
SCORES = 5 * A * S * S * B
LAYER = Block(name="layer", sequence=S)


def model(**fields):
    defaults = {"layers": 4, "hidden": H, "heads": A, "vocab": V, "sequence": S}
    return model_from_dict({**defaults, **fields})


def cluster(*, micro_batch=B, **parallel):
    ranks = parallel.get("tp", 1) * parallel.get("pp", 1)
    return cluster_from_dict(
        {
            "gpu": "h100-sxm-80gb",
            "gpus": ranks,
            "parallel": parallel,
            "batch": {"micro_batch": micro_batch},
            "efficiency": 0.5,
            "drive": "micron-9550-max-6.4tb",
        }
    )


def layer_bytes(split=None, **fields):
    """Without what has a few numbers a row, which papers leave out."""
    tensors = layer_tensors(model(**fields), LAYER, split or Split(batch=B))
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_row_statistic)


def by_name(tensors):
    return {tensor.name: tensor for tensor in tensors}


# --- Korthikanti et al. (arXiv 2205.05198)


@pytest.mark.parametrize("t", [1, 2, 4, 8])
def test_equations_1_to_4_of_korthikanti(t):
    assert layer_bytes(attention="naive") == 34 * SBH + SCORES
    split = Split(batch=B, tensor_parallel=t)
    assert layer_bytes(split, attention="naive") == 10 * SBH + (24 * SBH + SCORES) // t
    split = Split(batch=B, tensor_parallel=t, sequence_parallel=t > 1)
    assert layer_bytes(split, attention="naive") == (34 * SBH + SCORES) // t


@pytest.mark.parametrize("attention", ["naive", "flash"])
def test_selective_recomputation_does_away_with_scores(attention):
    assert layer_bytes(attention=attention, recompute="selective") == 34 * SBH


@pytest.mark.parametrize(("sp", "inputs"), [(False, 2 * SBH), (True, 2 * SBH // 4)])
def test_full_recomputation_keeps_the_input_of_each_layer(sp, inputs):
    split = Split(batch=B, tensor_parallel=4, sequence_parallel=sp)
    assert layer_bytes(split, recompute="full") == inputs


@pytest.mark.parametrize("t", [1, 2, 4])
def test_the_whole_model_of_korthikanti(t):
    """Section 4.3: layers, 4 s b h (1 + v / h) for the head with fp32 logits, and the mask of the embedding."""
    found = stages_of(model(attention="naive", loss_precision="fp32"), cluster(tp=t, sp=t > 1))
    tensors = [(group.count, tensor) for group in found[0].groups for tensor in group.tensors]
    nbytes = sum(count * tensor.nbytes for count, tensor in tensors if not tensor.is_row_statistic)
    assert nbytes == (4 * (34 * SBH + SCORES) + 4 * SBH + 4 * S * B * V + SBH) // t


# --- families and options


def test_gated_activations_save_four_tensors_and_fused_ones_three():
    plain = layer_bytes(dropout=False)
    inner = 2 * 4 * SBH
    assert layer_bytes(dropout=False, activation="swiglu") - plain == 2 * inner
    assert layer_bytes(dropout=False, activation="swiglu", fused_activation=True) - plain == inner
    assert layer_bytes(dropout=False, activation="relu") - plain == -inner


def test_heads_that_share_keys_save_less():
    assert layer_bytes() - layer_bytes(kv_heads=2) == 2 * 2 * SBH * 3 // 4
    # Each of 4 ranks holds a whole head of keys, though there are only 2.
    few = by_name(layer_tensors(model(kv_heads=2), LAYER, Split(batch=B, tensor_parallel=4)))
    assert few["attention.key"].shape == (B, S, H // A)
    assert few["attention.query"].shape == (B, S, H // 4)


def test_precisions_of_norms_and_losses_are_their_own():
    assert layer_bytes(norm_precision="fp32") - layer_bytes() == 2 * 2 * SBH
    assert layer_bytes(precision="fp32", dropout=False) == 64 * SBH
    half, full = (head_tensors(model(loss_precision=kind), Split(batch=B)) for kind in ("fp16", "fp32"))
    assert total_bytes(full) - total_bytes(half) == 2 * S * B * V


@pytest.mark.parametrize("place", ["attention_output", "feedforward"])
def test_a_mask_is_a_byte_where_there_is_dropout(place):
    assert layer_bytes(dropout=[place]) - layer_bytes(dropout=False) == SBH


def test_llama_has_no_dropout_and_one_statistic_a_row():
    tensors = by_name(layer_tensors(model(family="llama"), LAYER, Split(batch=B)))
    assert not any("mask" in name for name in tensors)
    assert tensors["attention_norm.statistics"].nbytes == 4 * S * B


def test_t5_decodes_with_cross_attention():
    t5 = model(family="t5", layers=5, decoder_sequence=32, dropout=False)
    (stage,) = stages_of(t5, cluster())
    groups = {group.name: group for group in stage.groups}
    assert (groups["encoder"].count, groups["decoder"].count) == (3, 2)  # half, rounded down, decode
    decoder = by_name(groups["decoder"].tensors)
    assert decoder["attention.key"].shape == (B, 32, H)
    assert decoder["cross_attention.query"].shape == (B, 32, H)
    assert decoder["cross_attention.key"].shape == (B, S, H)
    assert decoder["cross_attention.log_sum_exp"].shape == (B, A, 32)
    assert groups["memory"].tensors[0].nbytes == 2 * SBH, "all cross-attentions read one tensor"
    assert by_name(groups["head"].tensors)["loss.probabilities"].shape == (B, 32, V)
    assert [group.name for group in stage.groups].count("embedding") == 2


def test_stages_of_t5_have_what_belongs_to_their_layers():
    found = stages_of(model(family="t5", layers=8), cluster(pp=4))
    assert [[group.name for group in stage.groups] for stage in found] == [
        ["embedding", "encoder"],
        ["encoder"],
        ["embedding", "encoder_norm", "memory", "decoder"],
        ["memory", "decoder", "head"],
    ]


def test_a_pipeline_has_the_same_tensors_as_one_stage():
    whole = stages_of(model(), cluster())[0].saved_bytes
    assert sum(stage.saved_bytes for stage in stages_of(model(), cluster(pp=4))) == whole


def test_small_tensors_are_not_offloaded():
    (stage,) = stages_of(model(), cluster())
    assert stage.offloaded_bytes(1) == stage.saved_bytes
    assert stage.offloaded_bytes(2 * SBH) < stage.offloaded_bytes(SBH) < stage.saved_bytes
    assert stage.offloaded_bytes(1 << 40) == 0


# --- against what torch saves


def torch_tensors(module, *inputs):
    """Type and elements of all that autograd saves but parameters; views of the same bytes once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    seen, alive = {}, []

    def pack(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in parameters:
            seen[pointer, tensor.storage_offset(), tensor.numel()] = tensor
            alive.append(tensor)  # or another one is given its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module(*inputs)
    loss.backward()
    return Counter((tensor.dtype, tensor.numel()) for tensor in seen.values())


def counted(stage):
    """The plan in the same form."""
    expected = Counter()
    for group in stage.groups:
        for tensor in group.tensors:
            numel = tensor.one_bytes // tensor.element_bytes
            expected[TYPES[tensor.dtype], numel] += group.count * tensor.count
    return expected


TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int64": torch.int64, "bool": torch.bool}


class Attention(nn.Module):
    def __init__(self, kv_heads=A, *, is_causal=False):
        super().__init__()
        width = H // A
        self.heads, self.kv_heads, self.is_causal = A, kv_heads, is_causal
        self.query, self.last = nn.Linear(H, H), nn.Linear(H, H)
        self.key, self.value = nn.Linear(H, kv_heads * width), nn.Linear(H, kv_heads * width)

    def forward(self, x, memory):
        q, k, v = (
            part(source).unflatten(-1, (heads, H // A)).transpose(1, 2)
            for part, source, heads in (
                (self.query, x, self.heads),
                (self.key, memory, self.kv_heads),
                (self.value, memory, self.kv_heads),
            )
        )
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=self.is_causal, enable_gqa=self.heads != self.kv_heads
        )
        return self.last(mixed.transpose(1, 2).flatten(2))


class Feedforward(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(H, 4 * H), nn.Linear(4 * H, H), kind
        self.gate = nn.Linear(H, 4 * H) if kind == "silu" else None

    def forward(self, x):
        inner = getattr(nn.functional, self.kind)((self.gate or self.first)(x))
        return self.last(inner * self.first(x) if self.gate else inner)


class Layer(nn.Module):
    def __init__(self, kind, *, has_memory=False, is_causal=False):
        super().__init__()
        self.attention, self.feedforward = Attention(is_causal=is_causal), Feedforward(kind)
        self.norm, self.norm2 = nn.LayerNorm(H), nn.LayerNorm(H)
        self.cross, self.norm3 = (Attention(), nn.LayerNorm(H)) if has_memory else (None, None)

    def forward(self, x, memory=None):
        normed = self.norm(x)
        x = x + self.attention(normed, normed)
        if self.cross is not None:
            x = x + self.cross(self.norm3(x), memory)
        return x + self.feedforward(self.norm2(x))


class Bert(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, H), nn.Embedding(S, H)
        self.layers = nn.ModuleList(Layer("gelu") for _ in range(layers))
        self.norm, self.dense, self.transform_norm = nn.LayerNorm(H), nn.Linear(H, H), nn.LayerNorm(H)
        self.head = nn.Linear(H, V)

    def forward(self, tokens, targets):
        x = self.tokens(tokens) + self.positions(torch.arange(S))
        for layer in self.layers:
            x = layer(x)
        x = self.transform_norm(nn.functional.gelu(self.dense(self.norm(x))))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


class T5(nn.Module):
    def __init__(self, encoders, decoders, kind):
        super().__init__()
        self.tokens = nn.Embedding(V, H)
        self.encoders = nn.ModuleList(Layer(kind) for _ in range(encoders))
        self.decoders = nn.ModuleList(Layer(kind, has_memory=True, is_causal=True) for _ in range(decoders))
        self.encoder_norm, self.norm, self.head = nn.LayerNorm(H), nn.LayerNorm(H), nn.Linear(H, V)

    def forward(self, tokens, inputs, targets):
        memory, x = self.tokens(tokens), self.tokens(inputs)
        for layer in self.encoders:
            memory = layer(memory)
        memory = self.encoder_norm(memory)
        for layer in self.decoders:
            x = layer(x, memory)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Llama(nn.Module):
    def __init__(self, kv_heads):
        super().__init__()
        self.tokens, self.layer, self.norm, self.head = (
            nn.Embedding(V, H),
            Layer("silu"),
            nn.LayerNorm(H),
            nn.Linear(H, V),
        )
        self.layer.attention = Attention(kv_heads, is_causal=True)

    def forward(self, tokens, targets):
        logits = self.head(self.norm(self.layer(self.tokens(tokens))))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def indices(sequence=S):
    return torch.randint(V, (B, sequence))


@pytest.mark.parametrize("layers", [1, 3])
def test_every_tensor_of_a_bert_is_planned(layers):
    spec = model(family="bert", layers=layers, dropout=False, precision="fp32")
    assert torch_tensors(Bert(layers), indices(), indices()) == counted(stages_of(spec, cluster())[0])


@pytest.mark.parametrize(("encoders", "decoders", "kind"), [(1, 1, "relu"), (2, 1, "gelu"), (1, 2, "silu")])
def test_every_tensor_of_a_t5_is_planned(encoders, decoders, kind):
    spec = model(
        family="t5",
        layers=encoders + decoders,
        decoder_layers=decoders,
        decoder_sequence=48,
        activation={"silu": "swiglu"}.get(kind, kind),
        dropout=False,
        precision="fp32",
    )
    found = torch_tensors(T5(encoders, decoders, kind), indices(), indices(48), indices(48))
    assert found == counted(stages_of(spec, cluster())[0])


@pytest.mark.parametrize("kv_heads", [1, 2, A])
def test_every_tensor_of_a_llama_is_planned(kv_heads):
    spec = model(family="llama", layers=1, kv_heads=kv_heads, precision="fp32")
    found = torch_tensors(Llama(kv_heads), indices(), indices())
    # Its norms are LayerNorms here, with a mean a row: torch's RMSNorm is not one kernel on CPU.
    assert found - counted(stages_of(spec, cluster())[0]) == Counter({(torch.float32, B * S): 3})
    assert not counted(stages_of(spec, cluster())[0]) - found
