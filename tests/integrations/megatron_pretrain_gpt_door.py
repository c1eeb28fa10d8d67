"""The training script with the one line that a user may add to it, instead of starting it through the plugin."""

from megatron_pretrain_gpt import main

from ssdtrain_plugin.integrations.megatron import add_args

if __name__ == "__main__":
    main(extra_args_provider=add_args)
