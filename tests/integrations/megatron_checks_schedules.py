"""Checks of Megatron's schedules in one process."""

import gc
import inspect

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from megatron_checks import (
    BATCH,
    HIDDEN,
    MICROBATCHES,
    SEQUENCE,
    STEPS,
    Mlp,
    Run,
    Stage,
    assert_nothing_held,
    assert_same,
    batches,
    compare,
    config_of,
    forward_step,
    plugin,
    seed_all,
    settle,
    steps_of,
)


class Fault(Exception):  # noqa: N818 - a cause, told apart from errors
    """What a step of these checks is given up for."""


def check_megatron_picks_the_schedule_as_before(directory):
    names = {
        (1, None): "forward_backward_no_pipelining",
        (2, None): "forward_backward_pipelining_without_interleaving",
        (2, 2): "forward_backward_pipelining_with_interleaving",
    }
    own = {sizes: get_forward_backward_func(*sizes) for sizes in names}
    with plugin(directory):
        for sizes, name in names.items():
            picked = get_forward_backward_func(*sizes)
            assert picked is getattr(schedules, name)
            assert picked is not own[sizes]
            assert picked.__wrapped__ is own[sizes]
            assert picked.__name__ == name
            assert picked.__doc__ == own[sizes].__doc__
        assert get_forward_backward_func() is schedules.forward_backward_no_pipelining
    assert {sizes: get_forward_backward_func(*sizes) for sizes in names} == own


def check_one_loss_and_one_forward_for_each_microbatch(directory):
    def run(offload):
        stage = Stage(config_of(), Mlp())
        run = Run(stage)
        for count in (1, MICROBATCHES, 3):
            before = stage.num_forwards
            assert len(run.step(num_microbatches=count)) == count
            assert stage.num_forwards - before == count
        return run.found

    _, books = compare(run, directory, steps=3)
    assert [step["microbatches"] for step in books] == [1, MICROBATCHES, 3]


def check_a_model_in_a_list_is_the_model(directory):
    def run(offload):
        stage = Stage(config_of(), Mlp())
        run = Run(stage)
        run.step(model=[stage])
        run.step()
        return run.found

    compare(run, directory)


def check_forward_only_leaves_no_trace(directory):
    def run(offload):
        stage = Stage(config_of(), Mlp())
        run = Run(stage)
        held = []

        def look():
            cache = None if offload is None or offload.offloader is None else offload.offloader.cache
            held.append(None if cache is None else (len(cache._table), cache.num_microbatches))

        def evaluate():
            stage.after_forward = look
            results = [run.call(forward_only=True, num_microbatches=2)]
            with torch.no_grad():
                results.append(run.call(forward_only=True, num_microbatches=2))
            stage.after_forward = settle
            return results

        found = [evaluate()]
        assert offload is None or offload.offloader is None, "built for an evaluation"
        for _ in range(STEPS):
            run.step()
            found.append(evaluate())
        assert offload is None or held == [None] * 4 + [(0, 0)] * 4 * STEPS
        return found, run.found

    _, books = compare(run, directory)
    assert [step["microbatches"] for step in books] == [MICROBATCHES] * STEPS


def check_evaluation_with_a_schedule_imported_earlier_leaves_no_trace(directory):
    schedule = get_forward_backward_func()

    def run(offload):
        run = Run(Stage(config_of(), Mlp()), schedule=schedule)
        found = []
        for _ in range(STEPS):
            run.step()
            with torch.no_grad():
                found.append(run.call(forward_only=True, num_microbatches=2))
        return found, run.found

    _, books = compare(run, directory)
    assert [step["microbatches"] for step in books] == [MICROBATCHES] * STEPS


def check_data_that_is_no_loss_is_collected(directory):
    def run(offload):
        run = Run(Stage(config_of(), Mlp()))
        found = run.call(forward_only=True, collect_non_loss_data=True)
        assert [data["sizes"] for data in found] == [(SEQUENCE, BATCH, HIDDEN)] * MICROBATCHES
        run.steps()
        return found, run.call(forward_only=True, collect_non_loss_data=True), run.found

    compare(run, directory)


def check_a_schedule_imported_earlier_works_and_its_steps_are_counted(directory):
    schedule = get_forward_backward_func()

    def run(offload):
        return Run(Stage(config_of(), Mlp()), schedule=schedule).steps(3)

    _, books = compare(run, directory, steps=3)
    assert [step["microbatches"] for step in books] == [MICROBATCHES] * 3


def check_a_loop_of_ones_own_works(directory):
    """It calls the two step functions without a number of the micro-batch."""

    def schedule(*, forward_step_func, data_iterator, model, num_microbatches, **_):
        store, takes = [], inspect.signature(schedules.backward_step).parameters  # of the function that it wraps
        extra = [model.model_type] if "model_type" in takes else []
        for _ in range(num_microbatches):
            output, _ = schedules.forward_step(
                forward_step_func, data_iterator, model, num_microbatches, None, store, model.config, 1
            )
            schedules.backward_step(None, output, None, *extra, model.config)
        return store

    def run(offload):
        return Run(Stage(config_of(), Mlp()), schedule=schedule).steps()

    # Nothing tells where one of its steps ends: a micro-batch after which nothing is alive is one.
    compare(run, directory, steps=STEPS * MICROBATCHES)


def check_a_step_run_again_is_the_same_step(directory):
    """As Megatron's rerun machine does: same data, gradients cleared, no update between."""

    def run(offload):
        stage = Stage(config_of(), Mlp())
        run, weights = Run(stage), [parameter.detach().clone() for parameter in stage.parameters()]
        found = []
        for _ in range(3):
            data = Run(stage)._schedule.keywords["data_iterator"]  # from its beginning
            found.append((run.call(data_iterator=data), [parameter.grad.clone() for parameter in stage.parameters()]))
            for parameter in stage.parameters():
                parameter.grad = None
            if offload is not None:
                assert_nothing_held(offload.offloader)
        assert_same(found[1:], found[:1] * 2)
        assert_same([parameter.detach() for parameter in stage.parameters()], weights)
        return found

    compare(run, directory, steps=3)


class _Raise(torch.autograd.Function):
    """Raises in backward when it is told to."""

    @staticmethod
    def forward(ctx, x, switch):
        ctx.switch = switch
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.switch["backward"]:
            raise Fault
        return grad, None


class _Fragile(torch.nn.Module):
    def __init__(self, switch):
        super().__init__()
        self.first, self.second, self.switch = Mlp(), Mlp(), switch
        self.count = 0

    def forward(self, x):
        x = _Raise.apply(self.first(x), self.switch)
        self.count += 1
        if self.switch["forward"] == self.count:
            raise Fault
        return self.second(x)


def _broken_steps(schedule=None):
    def run(offload):
        switch = {"forward": 0, "backward": False}
        body = _Fragile(switch)
        run = Run(Stage(config_of(), body), schedule=schedule)
        for fault in ({"forward": 2}, {"backward": True}, {"forward": 1}):
            run.step()
            body.count = 0
            switch.update(fault)
            try:
                run.step()
                raise AssertionError("the step was to be given up")
            except Fault:
                pass
            switch.update(forward=0, backward=False)
            run.update(rate=0)  # clears the gradients
            if offload is not None and schedule is None:
                gc.collect()
                assert_nothing_held(offload.offloader)
        return run.steps(2)

    return run


def check_a_step_that_raises_in_the_middle_leaves_nothing(directory):
    _, books = compare(_broken_steps(), directory, steps=8, stores=None)
    assert [step["microbatches"] for step in books] == [4, 2, 4, 1, 4, 1, 4, 4]


def check_a_step_that_raises_under_a_schedule_imported_earlier_leaves_nothing(directory):
    _, books = compare(_broken_steps(get_forward_backward_func()), directory, steps=8, stores=None)
    assert [step["microbatches"] for step in books] == [4, 2, 4, 1, 4, 1, 4, 4]


def check_a_forward_whose_backward_never_runs_is_forgotten(directory):
    """A schedule of one's own that gives a step up holds no extent for ever."""
    schedule = get_forward_backward_func()
    with plugin(directory) as offload:
        seed_all()
        stage = Stage(config_of(), Mlp())
        run = Run(stage, schedule=schedule)
        run.step()
        store, data = [], batches()
        first = {"current_microbatch": 0}
        output = schedules.forward_step(forward_step, data, stage, 1, None, store, stage.config, 1, **first)
        assert not offload.offloader.cache.is_idle()
        del output
        run.step()
        assert_nothing_held(offload.offloader)
    assert [step["microbatches"] for step in steps_of(directory)] == [MICROBATCHES, 1, MICROBATCHES]
