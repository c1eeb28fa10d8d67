"""Small graphs of views, in-place operations, branches and re-used tensors, out of a program of steps.

A step is ``(kind, name, first, second)``; the numbers choose tensors of a pool.
"""

import torch

ROWS, COLUMNS = 4, 6


def _view(t):
    """Make any 2-D tensor (ROWS, COLUMNS) again, mostly by views."""
    return t.expand(ROWS, COLUMNS) if t.shape[0] == 1 or t.shape[1] == 1 else t


UNARY = {
    "exp": torch.exp,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "double transpose": lambda t: t.t().contiguous().t(),
    "row": lambda t: _view(t[1:2]),
    "column": lambda t: _view(t[:, 2:3]),
    "flip": lambda t: t.flip(0),
    "swap halves": lambda t: torch.cat(t.chunk(2, 1)[::-1], 1),
    "split and mix": lambda t: torch.cat([a * b for a, b in zip(t.split(3, 1), t.split(3, 1)[::-1], strict=True)], 1),
    "glu": lambda t: torch.cat([t[:, :3] * torch.sigmoid(t[:, 3:])] * 2, 1),
    "unbind": lambda t: torch.stack(t.unbind(0)[::-1]),
    "unsafe chunk": lambda t: torch.cat([c.sigmoid_() for c in torch.unsafe_chunk(t * 1, 2, 1)], 1),
    "as_strided": lambda t: t.contiguous().as_strided((ROWS, COLUMNS), (3, 1), 2),
    "dropout": lambda t: torch.dropout(t, 0.4, True),
    "softmax": lambda t: t.softmax(1),
    "norm": lambda t: torch.layer_norm(t, (COLUMNS,)),
    "where": lambda t: torch.where(t > 0, t, t.sin()),
    "cumsum": lambda t: t.cumsum(0),
    "max": lambda t: t * t.max(1, keepdim=True).values,
    "bf16": lambda t: t.bfloat16().sin().float(),
    "view": lambda t: t.view(ROWS, COLUMNS) if t.is_contiguous() else t.reshape(ROWS, COLUMNS),
    "alias": lambda t: t[:],
    "clone": lambda t: t.clone(),
    "detach": lambda t: t.detach(),
}
BINARY = {
    "mul": torch.mul,
    "add": torch.add,
    "div": lambda a, b: a / (1 + b * b),
    "matmul": lambda a, b: a @ b.t() @ a,
    "cat": lambda a, b: torch.cat((a[:2], b[2:])),
    "stack": lambda a, b: torch.stack((a, b)).sum(0),
    "gather": lambda a, b: a.gather(1, b.detach().argsort(1)),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
}
IN_PLACE = {
    "add_": lambda t: t.add_(0.5),
    "mul_": lambda t: t.mul_(1.5),
    "exp_": lambda t: t.clamp_(-1, 1).exp_(),
    "sigmoid_": lambda t: t.sigmoid_(),
    "zero a column": lambda t: t[:, 1].zero_(),
    "fill a row": lambda t: t[2].fill_(0.25),
    "relu_": lambda t: t.relu_(),
    "sub-view mul_": lambda t: t[1:, 2:].mul_(0.5),
    "detached add_": lambda t: t.detach().add_(0.125),
}


def leaves():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(ROWS, COLUMNS, generator=generator).requires_grad_() for _ in range(3)]


def run_steps(program, pool):
    """Run the program on a pool; drop what is not used again, as a model does.

    Illegal in-place steps raise RuntimeError.
    """
    for kind, name, first, second in program:
        a, b = pool[first % len(pool)], pool[second % len(pool)]
        if kind == "in place":
            IN_PLACE[name](a)
            continue
        result = UNARY[name](a) if kind == "unary" else BINARY[name](a, b)
        if len(pool) > 5:
            pool.pop(second % len(pool))
        pool.append(result)


def loss_of(pool):
    return sum(t.float().sin().sum() for t in pool)


def build(program, inputs):
    """Run the program on copies of the inputs; give a loss that depends on all that is left."""
    torch.manual_seed(11)
    pool = [x * 1.0 for x in inputs]
    run_steps(program, pool)
    return loss_of(pool)


def backward(loss, inputs, passes, after_pass=lambda: None):
    found = []
    for number in range(passes):
        found += torch.autograd.grad(loss, inputs, retain_graph=number + 1 < passes, allow_unused=True)
        after_pass()
    return found
