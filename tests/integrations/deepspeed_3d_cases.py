"""What the worker of the 3D job trains and the test compares. Imports nothing heavy."""

from deepspeed_cases import Case

STEPS = 4

# ZeRO-1 and bf16 tell the norm of the gradients; plain fp32 does not.
_3d = Case("", zero=1, dropout=0.1, num_blocks=4)
CASES = [
    _3d.but("zero1_fp32"),
    _3d.but("zero0_bf16", zero=0, dtype="bf16"),
    # Without dropout: DeepSpeed's checkpointing does not know Megatron's random states.
    _3d.but("checkpointed", dropout=0.0, interval=1),
]
