"""What a run measured, as plain numbers: the other side of a calibration. Reads nothing itself."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MeasuredRank", "MeasuredSave"]


@dataclass(frozen=True, slots=True)
class MeasuredSave:
    """One storage that a micro-batch saved.

    Attributes:
        layer: Whose save it was, for example ``layers.3``.
        module: The innermost module that was running; empty outside of named ones.
        nbytes: Its size.
    """

    layer: str
    module: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class MeasuredRank:
    """The steady steps of one rank; all but the counts are medians of a step.

    What is None was not recorded: lengths of steps, transfers and saves are only known of steps
    that were traced.

    Attributes:
        rank: Global rank.
        first_step: Number of the first steady step.
        num_steps: Steady steps.
        num_traced_steps: Of these, how many were traced.
        device: Where the activations were, or None.
        saved_bytes: What would have been live without the plugin, at its highest.
        peak_bytes: Live saved bytes in device memory, at their highest.
        stored_bytes: Written to the drives.
        host_bytes: Copied to the host tier.
        loaded_bytes: Brought back.
        forwarded_bytes: Handed back from memory, because backward came first.
        kept_bytes: Stayed in device memory by decision, or because a store failed.
        stall_seconds: That training waited for transfers.
        forward_seconds: Host time in all forward passes.
        backward_seconds: Host time in all backward passes.
        step_seconds: Length of the step.
        waiting_seconds: In instructions of the host's schedule that receive from another stage.
        write_bytes_per_second: Of its drives together, for each second in which they wrote.
        read_bytes_per_second: The same for reading.
        num_drives: That it wrote to.
        saves: Of one micro-batch.
        saved_alike: How many micro-batches of the traced ones saved the same (0 to 1).
    """

    rank: int
    first_step: int
    num_steps: int
    num_traced_steps: int
    device: str | None
    saved_bytes: float
    peak_bytes: float
    stored_bytes: float
    host_bytes: float
    loaded_bytes: float
    forwarded_bytes: float
    kept_bytes: float
    stall_seconds: float
    forward_seconds: float
    backward_seconds: float
    step_seconds: float | None
    waiting_seconds: float | None
    write_bytes_per_second: float | None
    read_bytes_per_second: float | None
    num_drives: int
    saves: tuple[MeasuredSave, ...] | None
    saved_alike: float

    @property
    def is_behind_host(self) -> bool:
        """Whether kernels run behind the host, whose times then say little."""
        return self.device is not None and not self.device.startswith("cpu")
