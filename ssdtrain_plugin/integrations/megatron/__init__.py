"""Megatron: flags in, offloading under its own schedules out.

Three doors lead to the same place:

* ``add_args`` as the ``extra_args_provider`` of a training script;
* ``enable(args)`` in a loop of one's own on megatron-core;
* ``python -m ssdtrain_plugin.run pretrain_gpt.py ...`` for a script that is not changed.

Nothing of Megatron is edited. What is put in place of its own is a handful of module
attributes, each looked up by Megatron when it is called, and put back by ``disable``:
see :mod:`ssdtrain_plugin.integrations.megatron.takeover`.
"""

from ssdtrain_plugin.integrations.megatron.takeover import MegatronOffload
from ssdtrain_plugin.integrations.megatron.training import add_args, enable, prepare_script

__all__ = ["MegatronOffload", "add_args", "enable", "prepare_script"]
