"""The training script with a last rank that fails in the third step: ``raise`` or ``kill`` in ``FAILS_BY``."""

import os
import resource
import signal

import megatron_pretrain_gpt as script
import torch

FAILING_CALL = 11  # of four micro-batches a step
forward_step, calls = script.forward_step, []


def failing_forward_step(data_iterator, model):
    calls.append(1)
    if len(calls) == FAILING_CALL and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        if os.environ["FAILS_BY"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError(f"out of data, with at most {resource.getrlimit(resource.RLIMIT_AS)[0]} bytes")
    return forward_step(data_iterator, model)


if __name__ == "__main__":
    script.forward_step = failing_forward_step
    script.main()
