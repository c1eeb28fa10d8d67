"""Checks of experts, of multi-token prediction and of parameters in flat buffers, in one process."""

import megatron_models as models
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron_checks import HIDDEN, MICROBATCHES, STEPS, Mlp, Run, Skip, Stage, assert_same, compare, config_of, settle
from torch import nn

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CALLS = STEPS * MICROBATCHES


def _train_gpt(model):
    """Train a GPT on tokens; return losses and gradients of each step."""
    losses = []
    inner = models.forward_of("gpt", losses)

    def forward(data, model):
        output = inner(data, model)
        settle()
        return output

    run = Run(model)
    for _ in range(STEPS):
        run.step(forward_step_func=forward, data_iterator=models.Microbatches(7))
    return losses, run.found


# ---------------------------------------------------------------------- experts


def _experts(dispatcher, **more):
    """Make a GPT of dropless experts; return it and the sizes of what each expert got."""
    config = config_of(
        num_layers=2,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_token_dispatcher_type=dispatcher,
        moe_grouped_gemm=False,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        add_bias_linear=False,
        **more,
    )
    assert config.moe_expert_capacity_factor is None, "not dropless"
    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False)
    model = GPTModel(config, spec, models.VOCABULARY, models.SEQUENCE)
    experts = [module for module in model.modules() if isinstance(module, SequentialMLP)]
    assert len(experts) == 2, "the layers have no experts"
    sizes = set()
    for expert in experts:
        expert.local_experts[0].register_forward_pre_hook(lambda _, args: sizes.add(args[0].shape))
    return model, sizes


def _check_experts(directory, dispatcher, **config):
    def run(offload):
        try:
            model, sizes = _experts(dispatcher, **config)
            found = _train_gpt(model)
        except NameError as error:
            if "te_general_gemm" not in str(error):
                raise
            raise Skip("this megatron-core cannot route without TransformerEngine") from None
        assert len(sizes) > 2, "every micro-batch had the same sizes"
        return found

    compare(run, directory)


def check_dropless_experts_with_allgather(directory):
    _check_experts(directory, "allgather")


def check_dropless_experts_with_alltoall(directory):
    _check_experts(directory, "alltoall")


def check_dropless_experts_whose_layers_would_be_recomputed(directory):
    _check_experts(directory, "allgather", **FULL)


def check_dropless_experts_recomputed_alone(directory):
    _check_experts(directory, "allgather", recompute_granularity="selective", recompute_modules=["moe"])


# ---------------------------------------------------------------------- multi-token prediction


def _check_mtp(directory, *, without, with_plugin, **config):
    counts = []

    def run(offload):
        own = config_of(num_layers=2, mtp_num_layers=1, **config)
        layer = get_gpt_layer_local_spec()
        heads = get_gpt_mtp_block_spec(own, layer, use_transformer_engine=False)
        model = GPTModel(own, layer, models.VOCABULARY, models.SEQUENCE, mtp_block_spec=heads)
        calls = []
        for module in model.modules():
            if isinstance(module, TransformerLayer):
                module.register_forward_pre_hook(lambda *_: calls.append(1))
        found = _train_gpt(model)
        counts.append(len(calls) // CALLS)
        return found

    compare(run, directory)
    assert counts == [without, with_plugin]


def check_multi_token_prediction(directory):
    _check_mtp(directory, without=3, with_plugin=3)


def check_multi_token_prediction_that_would_be_recomputed(directory):
    _check_mtp(directory, without=6, with_plugin=3, **FULL)


# ---------------------------------------------------------------------- parameters


class _SaveAll(torch.autograd.Function):
    """A linear layer that saves its weight in ways that do not show that it is one."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight.data, weight.detach().t())
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight, transposed = ctx.saved_tensors
        assert torch.equal(weight, transposed.t())
        return grad @ weight, grad.flatten(0, 1).t() @ x.flatten(0, 1)


class _Opaque(nn.Linear):
    def forward(self, x):
        return _SaveAll.apply(x, self.weight)


def _flatten(module):
    """Make every parameter a view of one new buffer, as Megatron's ``param_and_grad_buffer`` does."""
    parameters = list(module.parameters())
    buffer = torch.cat([parameter.data.flatten() for parameter in parameters])
    for parameter, piece in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
        parameter.data = piece.view(parameter.shape)
    return buffer


def _flat_body():
    return nn.Sequential(_Opaque(HIDDEN, HIDDEN, bias=False), Mlp(), _Opaque(HIDDEN, HIDDEN, bias=False))


def _count_stored(stage, offload, stored):
    """Remember how much is on the drive after each forward, when all that was saved is there."""

    def look():
        settle()
        if offload is not None:
            stored.append(sum(tier.used_bytes for tier in offload.offloader._tiers.values()))

    stage.after_forward = look


def check_parameters_in_a_flat_buffer_are_never_offloaded(directory):
    """Also when they are moved into another one after the first step, and again."""
    stored = []

    def run(offload):
        stage = Stage(config_of(), _flat_body())
        run, buffers = Run(stage), []
        _count_stored(stage, offload, stored)
        run.step()
        for _ in range(2):
            buffers.append(_flatten(stage))
            run.step()
            assert all(p.untyped_storage()._cdata == buffers[-1].untyped_storage()._cdata for p in stage.parameters())
        return run.found

    _, books = compare(run, directory, steps=3)
    assert len(stored) == 3 * MICROBATCHES
    assert len(set(stored)) == 1, stored
    assert len({step["saved_bytes"] for step in books}) == 1


def check_parameters_in_a_flat_buffer_from_the_start(directory):
    seen = []
    for name in ("flat", "plain"):
        stored = []

        def run(offload, name=name, stored=stored):
            stage = Stage(config_of(), _flat_body())
            _count_stored(stage, offload, stored)
            buffer = _flatten(stage) if name == "flat" else None
            found = Run(stage).steps()
            del buffer
            return found

        (directory / name).mkdir()
        found, _ = compare(run, directory / name)
        seen.append((found, stored))
    assert_same(*seen)


def check_megatrons_ddp_with_the_buffers_of_its_distributed_optimizer(directory):
    def run(offload):
        config = config_of(num_layers=2)
        model = GPTModel(config, get_gpt_layer_local_spec(), models.VOCABULARY, models.SEQUENCE)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=False)
        model = DistributedDataParallel(config, ddp, model)
        config.finalize_model_grads_func = finalize_model_grads
        weights = list(model.parameters())
        assert len({weight.untyped_storage()._cdata for weight in weights}) == 1, "not in one buffer"
        losses, found = [], []
        forward = models.forward_of("gpt", losses)
        run = Run(model)
        for _ in range(STEPS):
            model.zero_grad_buffer()
            run.call(forward_step_func=forward, data_iterator=models.Microbatches(7))
            found.append([weight.main_grad.clone() for weight in weights])
            with torch.no_grad():
                for weight in weights:
                    weight -= 0.05 * weight.main_grad
        return losses, found

    compare(run, directory)
