"""Small models of megatron-core for the CPU, their data and their gradients."""

import hashlib
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.models.T5 import T5Model
from megatron.core.models.T5.t5_spec import get_t5_decoder_with_local_block_spec, get_t5_encoder_with_local_block_spec
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

VOCABULARY, HIDDEN, SEQUENCE, BATCH = 96, 64, 32, 2


class TaggedLayerNorm(torch.nn.LayerNorm):
    """A layer norm under sequence parallelism: Megatron's local one refuses, though all it needs is this mark."""

    def __init__(self, config, hidden_size, eps=1e-5, **_):
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


def transformer_config(case):
    tp, pp, vpp = case.layout
    is_bf16 = case.dtype == "bf16"
    common = {
        "num_layers": case.num_layers,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
        "pipeline_dtype": torch.bfloat16 if is_bf16 else torch.float32,
        "bf16": is_bf16,
        "params_dtype": torch.bfloat16 if is_bf16 else torch.float32,
        "deallocate_pipeline_outputs": True,
    }
    return TransformerConfig(**{**common, **case.config})


def _gpt(config, is_first, is_last, chunk):
    layer = spec = get_gpt_layer_local_spec()
    if config.sequence_parallel:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = TaggedLayerNorm
        spec = TransformerBlockSubmodules([layer] * config.num_layers, layer_norm=TaggedLayerNorm)
    more = {}
    if config.mtp_num_layers:
        more["mtp_block_spec"] = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False)
    return GPTModel(
        config, spec, VOCABULARY, SEQUENCE, pre_process=is_first, post_process=is_last, vp_stage=chunk, **more
    )


def _bert(config, is_first, is_last, chunk):
    return BertModel(
        config,
        0,
        bert_layer_local_spec,
        VOCABULARY,
        SEQUENCE,
        pre_process=is_first,
        post_process=is_last,
        vp_stage=chunk,
    )


def _t5(config, is_first, is_last, chunk):
    encoder, decoder = (
        get_t5_encoder_with_local_block_spec(config.num_layers),
        get_t5_decoder_with_local_block_spec(config.num_layers),
    )
    return T5Model(config, config, encoder, decoder, VOCABULARY, SEQUENCE, pre_process=is_first, post_process=is_last)


_MAKERS = {"gpt": _gpt, "bert": _bert, "t5": _t5}


def build(case, seed):
    """Build the model chunks of this rank.

    Args:
        case: Which model, in which layout.
        seed: Of the initial weights.
    """
    torch.manual_seed(seed)
    config = transformer_config(case)
    chunks = []
    for number in range(case.layout[2] or 1):
        chunk = number if case.layout[2] else None
        is_first = parallel_state.is_pipeline_first_stage(ignore_virtual=chunk is None, vp_stage=chunk)
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=chunk is None, vp_stage=chunk)
        model = _MAKERS[case.model](config, is_first, is_last, chunk)
        model = Float16Module(config, model) if case.dtype == "bf16" else model
        if case.uses_ddp:
            model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
            config.finalize_model_grads_func = finalize_model_grads
        chunks.append(model)
    return chunks


class Microbatches:
    """Endless micro-batches, the same for the same seed.

    Args:
        seed: Of the data.
    """

    def __init__(self, seed):
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self):
        return self

    def __next__(self):
        tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=self._generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def forward_of(kind, losses):
    """Make the forward step function that Megatron's schedules call.

    Args:
        kind: Of the model.
        losses: Gets the loss of every micro-batch.
    """

    def loss_of(output):
        loss = (output[0] if isinstance(output, tuple) else output).float().mean()
        losses.append(loss.item().hex())
        return loss, {"loss": loss.detach()}

    def forward(data, model):
        tokens, labels = next(data)
        if kind == "gpt":
            positions = torch.arange(SEQUENCE).expand(BATCH, -1)
            hidden = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
            return model(tokens, positions, hidden, labels=labels), loss_of
        if kind == "bert":
            return model(tokens, torch.ones(BATCH, SEQUENCE, dtype=torch.bool), None, labels), loss_of
        nothing = torch.zeros(BATCH, 1, SEQUENCE, SEQUENCE, dtype=torch.bool)
        return model(tokens, labels, nothing, nothing | nothing[0, 0].triu(1), nothing, lm_labels=labels), loss_of

    return forward


def gradients(chunks):
    """Yield name and gradient of every parameter of this rank."""
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            yield f"{number}.{name}", parameter.grad if gradient is None else gradient


def digest(chunks):
    """Hash every gradient of this rank, bit by bit; return the hashes by name, and the norm."""
    hashes, square = {}, torch.zeros((), dtype=torch.float64)
    for name, gradient in gradients(chunks):
        if gradient is None:
            hashes[name] = None
            continue
        hashes[name] = hashlib.sha256(gradient.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        square += gradient.double().pow(2).sum()
    return hashes, square.sqrt().item().hex()


def update(chunks, rate=0.05):
    """Take one step of plain gradient descent and clear the gradients."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                gradient = getattr(parameter, "main_grad", None)
                gradient = parameter.grad if gradient is None else gradient
                if gradient is not None:
                    parameter -= rate * gradient.to(parameter.dtype)
                parameter.grad = None
            if hasattr(chunk, "zero_grad_buffer"):
                chunk.zero_grad_buffer()


def forward_only(function):
    """Bind a schedule to evaluation, as Megatron's own loop calls it: without a graph."""
    return torch.no_grad()(partial(function, forward_only=True))
