"""From what was measured in a step to the planner's terms."""

from __future__ import annotations

import itertools

from ssdtrain_plugin.planner.timeline import Event, Phase, Profile, Save, Schedule
from ssdtrain_plugin.profile import MicrobatchProfile, StepProfile

__all__ = ["schedule_of"]


def schedule_of(step: StepProfile, *, lookahead_events: int) -> Schedule | None:
    """Describe a measured step as the planner's schedule.

    Args:
        step: Of one stage; its passes may have gaps between them, in which it waited for others.
        lookahead_events: How many passes ahead the host announces a backward.

    Returns:
        The schedule; None if the passes overlap, which no stage can run.
    """
    passes: list[tuple[float, float, Phase, int]] = []
    for number, microbatch in enumerate(step.microbatches):
        passes.append((microbatch.forward_begin, microbatch.forward_end, Phase.FORWARD, number))
        passes.append((microbatch.backward_begin, microbatch.backward_end, Phase.BACKWARD, number))
    passes.sort(key=lambda each: each[:2])
    events: list[Event] = []
    now = 0.0
    for begin, end, phase, number in passes:
        if begin > now:
            events.append(Event(Phase.IDLE, seconds=begin - now))
        elif now - begin > 0.5 * (end - begin):
            return None
        events.append(Event(phase, number))
        now = max(now, end)
    profiles = tuple(_profile(microbatch) for microbatch in step.microbatches)
    return Schedule(profiles, tuple(events), lookahead_events)


def _profile(microbatch: MicrobatchProfile) -> Profile:
    forward_seconds = microbatch.forward_end - microbatch.forward_begin
    backward_seconds = microbatch.backward_end - microbatch.backward_begin
    asks = sorted({save.needed_seconds for save in microbatch.saves if save.needed_seconds is not None})
    # Backward lets go of one thing when it goes on to the next, as far as the hooks can see.
    following = dict(itertools.pairwise([*asks, backward_seconds]))
    saves = []
    saved_seconds = 0.0
    for save in microbatch.saves:
        saved_seconds = min(max(saved_seconds, save.saved_seconds), forward_seconds)
        needed = backward_seconds if save.needed_seconds is None else min(save.needed_seconds, backward_seconds)
        released = backward_seconds if save.needed_seconds is None else following[save.needed_seconds]
        saves.append(
            Save(
                nbytes=save.nbytes,
                saved_seconds=saved_seconds,
                needed_seconds=needed,
                released_seconds=min(max(needed, released), backward_seconds),
                is_movable=save.is_movable and save.needed_seconds is not None,
            )
        )
    return Profile(tuple(saves), forward_seconds, backward_seconds)
