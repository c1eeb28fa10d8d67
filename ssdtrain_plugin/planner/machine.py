"""What moves bytes, and within which bounds: the numbers of a drive, a host tier and the runtime."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["UNBOUNDED_BYTES", "Machine"]

UNBOUNDED_BYTES = 1 << 62


@dataclass(frozen=True)
class Machine:
    """Bandwidths and bounds.

    Attributes:
        write_bytes_per_second: Of the drive, with nothing read meanwhile.
        read_bytes_per_second: Of the drive, with nothing written meanwhile.
        latency_seconds: Added to each transfer with the drive.
        mixed_share: Share of its own rate that each direction has while both are busy:
            1.0 is full duplex, 0.5 two directions that share one bandwidth.
        prefetch_bytes: Bound on bytes that are loaded, or held, for a backward that has not asked yet.
        window_bytes: The same bound, but with the kept saves that backward has not asked for:
            no load begins while the kept tail is enough to go on with.
        max_inflight_bytes: Bound on stores that are queued or running.
        waits_when_full: Forward waits at ``max_inflight_bytes``; otherwise the save is kept.
        host_bytes: Bound on the host tier.
        host_bytes_per_second: Of the host tier, in each direction.

    Raises:
        ValueError: A number is out of its range.
    """

    write_bytes_per_second: float
    read_bytes_per_second: float
    latency_seconds: float = 0.0
    mixed_share: float = 1.0
    prefetch_bytes: int = UNBOUNDED_BYTES
    window_bytes: int = UNBOUNDED_BYTES
    max_inflight_bytes: int = UNBOUNDED_BYTES
    waits_when_full: bool = False
    host_bytes: int = 0
    host_bytes_per_second: float = math.inf

    def __post_init__(self) -> None:
        """Refuse rates and bounds that mean nothing."""
        for name in ("write_bytes_per_second", "read_bytes_per_second", "host_bytes_per_second"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} is {getattr(self, name)} (expected more than 0)")
        for name in ("latency_seconds", "prefetch_bytes", "window_bytes", "max_inflight_bytes", "host_bytes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)} (expected at least 0)")
        if not 0.5 <= self.mixed_share <= 1.0:
            raise ValueError(f"mixed_share is {self.mixed_share} (expected 0.5 to 1.0)")

    def store_seconds(self, nbytes: int) -> float:
        """How long the drive takes to store a save of ``nbytes``, alone."""
        return self.latency_seconds + nbytes / self.write_bytes_per_second

    def load_seconds(self, nbytes: int) -> float:
        """How long the drive takes to load a save of ``nbytes``, alone."""
        return self.latency_seconds + nbytes / self.read_bytes_per_second

    def host_seconds(self, nbytes: int) -> float:
        """How long a save of ``nbytes`` takes to or from host memory."""
        return nbytes / self.host_bytes_per_second
