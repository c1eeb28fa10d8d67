"""The events of a trace: what is written, a line each, and what the report reads. Observes; decides nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Literal

__all__ = [
    "Event",
    "InstructionEvent",
    "MemoryEvent",
    "PassEvent",
    "SaveEvent",
    "StartEvent",
    "StepEvent",
    "TransferEvent",
    "WaitEvent",
    "to_json",
]


@dataclass(frozen=True, slots=True)
class StartEvent:
    """A process began to record.

    Attributes:
        rank: Global rank of the process.
        clock_seconds: On the clock of all other events.
        wall_seconds: The same moment, since 1970.
        device: Where the activations are.
    """

    rank: int
    clock_seconds: float
    wall_seconds: float
    device: str
    event: Literal["start"] = "start"


@dataclass(frozen=True, slots=True)
class PassEvent:
    """A forward or a backward of one micro-batch has ended.

    Attributes:
        step: In which it ended.
        kind: Which of the two.
        microbatch: Its number, which never begins again.
        slot: How the host's schedule names the micro-batch; None if it does not.
        begin: Host seconds.
        end: Host seconds.
        is_exact: The host said so; else a backward lasts from its first to its last unpack.
    """

    step: int
    kind: Literal["forward", "backward"]
    microbatch: int
    slot: str | None
    begin: float
    end: float
    is_exact: bool
    event: Literal["pass"] = "pass"


@dataclass(frozen=True, slots=True)
class InstructionEvent:
    """The host's schedule did something else than a pass, such as to wait for its neighbour.

    Attributes:
        step: In which it ended.
        name: As the host calls it.
        begin: Host seconds.
        end: Host seconds.
    """

    step: int
    name: str
    begin: float
    end: float
    event: Literal["instruction"] = "instruction"


@dataclass(frozen=True, slots=True)
class SaveEvent:
    """Autograd saved a storage that was not known yet.

    Attributes:
        step: Of the save.
        at: Host seconds.
        serial: Of its record; transfers and waits have the same one.
        microbatch: Whose forward saved it.
        module: Name of the innermost module that was running, or None.
        nbytes: Its size.
    """

    step: int
    at: float
    serial: int
    microbatch: int
    module: str | None
    nbytes: int
    event: Literal["save"] = "save"


@dataclass(frozen=True, slots=True)
class TransferEvent:
    """A transfer has ended, or was taken back before it began.

    Attributes:
        step: In which it ended.
        direction: ``spill`` goes from host memory to the drive, ``promote`` the other way.
        tier: ``ssd`` or ``host``; for the last two directions ``ssd``.
        drive: Which one of several.
        path: Its directory, or None.
        serial: Of the record.
        nbytes: Its size.
        queued: Host seconds.
        begin: Host seconds; the same as ``end`` if it was cancelled.
        end: Host seconds.
        is_on_demand: Backward was waiting for it when it was queued.
        outcome: ``given up`` means that it ran too long.
    """

    step: int
    direction: Literal["store", "load", "spill", "promote"]
    tier: str
    drive: int
    path: str | None
    serial: int
    nbytes: int
    queued: float
    begin: float
    end: float
    is_on_demand: bool
    outcome: Literal["done", "failed", "given up", "cancelled"]
    event: Literal["transfer"] = "transfer"


@dataclass(frozen=True, slots=True)
class WaitEvent:
    """Training waited.

    Attributes:
        step: Of the wait.
        reason: For a ``load``, or for ``room`` in the queue of stores.
        serial: Of the record that was waited for; None when it was room.
        module: Of the record, or the one that was running.
        begin: Host seconds.
        end: Host seconds.
    """

    step: int
    reason: Literal["load", "room"]
    serial: int | None
    module: str | None
    begin: float
    end: float
    event: Literal["wait"] = "wait"


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """The number of live bytes has changed.

    Attributes:
        step: Of the change.
        at: Host seconds.
        device_bytes: Saved bytes in device memory.
        would_be_bytes: What would be there without the plugin.
        host_bytes: Reserved in the host tier.
        drive_bytes: Reserved on the drives.
    """

    step: int
    at: float
    device_bytes: int
    would_be_bytes: int
    host_bytes: int
    drive_bytes: int
    event: Literal["memory"] = "memory"


@dataclass(frozen=True, slots=True)
class StepEvent:
    """A recorded step has ended.

    Attributes:
        step: Its number.
        begin: Host seconds; the end of the step before.
        end: Host seconds.
        plan: The policy's decision in one line.
    """

    step: int
    begin: float
    end: float
    plan: str
    event: Literal["step"] = "step"


Event = StartEvent | PassEvent | InstructionEvent | SaveEvent | TransferEvent | WaitEvent | MemoryEvent | StepEvent


def to_json(event: Event) -> str:
    """Write one event as one line.

    Args:
        event: Any.
    """
    values = {field.name: getattr(event, field.name) for field in fields(event)}
    return json.dumps(values, separators=(",", ":"))
