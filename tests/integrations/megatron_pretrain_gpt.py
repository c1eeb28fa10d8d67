"""A training script of a Megatron user, in the manner of pretrain_gpt.py. It knows nothing of the plugin.

The first function is for the tests: it lets Megatron's training loop run where there is no CUDA. All that is below it
is what such a script has to say: a model, data, a loss, and one call. The call has two forms: up to megatron-core 0.17
``pretrain`` parses the flags, from 0.18 on the script does.
"""

import os

import megatron_shim
import torch


def run_without_cuda():
    # DeepSpeed sets it, for all its children, and then torch takes what the shim counts for GPUs that are there.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    megatron_shim.limit_address_space()
    megatron_shim.install(streams=True, extra=True)
    megatron_shim.let_pretrain_run_without_cuda()
    megatron_shim.let_pretrain_skip_compiling_its_dataset_helpers()
    megatron_shim.let_pretrain_know_an_architecture()
    # Megatron clips, and prints the norm, only of gradients whose type has "cuda" in its name.
    name_of = torch.Tensor.type

    def type_(tensor, *args, **kwargs):
        result = name_of(tensor, *args, **kwargs)
        return result.replace("torch.Float", "torch.cuda.Float") if isinstance(result, str) else result

    torch.Tensor.type = type_


run_without_cuda()

from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.training import arguments, get_args, pretrain  # noqa: E402


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None, **_):
    args = get_args()
    return GPTModel(
        config or arguments.core_transformer_config_from_args(args),
        get_gpt_layer_local_spec(),
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


class Sequences(torch.utils.data.Dataset):
    def __len__(self):
        return 10000

    def __getitem__(self, number):
        tokens = torch.randint(100, (get_args().seq_length + 1,), generator=torch.Generator().manual_seed(number))
        return {"tokens": tokens[:-1], "labels": tokens[1:]}


def datasets_provider(num_samples, vp_stage=None):
    return Sequences(), Sequences(), Sequences()


datasets_provider.is_distributed = True  # every rank reads for itself


def loss_func(output):
    total, count = output.float().sum(), torch.tensor(output.numel(), dtype=torch.int, device="cuda")
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def forward_step(data_iterator, model):
    batch = next(data_iterator)
    tokens, labels = batch["tokens"].cuda(non_blocking=True), batch["labels"].cuda(non_blocking=True)
    length = tokens.shape[1]
    positions = torch.arange(length, device="cuda").expand_as(tokens)
    hidden = torch.ones(1, 1, length, length, dtype=torch.bool, device="cuda").triu(1)
    return model(tokens, positions, hidden, labels=labels), loss_func


def main(extra_args_provider=None):
    if not hasattr(arguments, "parse_and_validate_args"):  # up to 0.17
        kind = ModelType.encoder_or_decoder
        pretrain(datasets_provider, model_provider, kind, forward_step, extra_args_provider=extra_args_provider)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    args = arguments.parse_and_validate_args(extra_args_provider=extra_args_provider)
    config = pretrain_cfg_container_from_args(args)
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step, model_provider)


if __name__ == "__main__":
    main()
