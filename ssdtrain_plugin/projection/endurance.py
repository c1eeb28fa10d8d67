"""How many drives a rank needs, and how long they last. Each assumption about wear is an input of its own.

Note [Life of a drive]. SSDTrain (arXiv 2408.10013, III-D): ``life = endurance * step time / bytes a step``. The
endurance is the rating (TBW) of the drives of one rank, times what one is willing to credit: the rating is for
JEDEC's random workload (JESD219), whose write amplification the paper takes as 2.5 and that of large sequential
writes as 1; and it is for data that must be readable for months, where activations are needed for a second, for
which the paper takes 86 times the cycles (3 years down to 1 day). Vendors rate the first effect: Micron's 9550 MAX
has 35,040 TBW under random and 74,200 TBW under sequential writes, 2.1 times as much. The second is in no data
sheet, and a drive's own wear counter will not know of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ssdtrain_plugin.projection.cluster import ClusterSpec

__all__ = ["DAY_SECONDS", "YEAR_SECONDS", "DriveLife", "DriveNeed", "drive_life", "drive_need"]

DAY_SECONDS = 86_400.0
YEAR_SECONDS = 365.25 * DAY_SECONDS


@dataclass(frozen=True, slots=True)
class DriveNeed:
    """What one rank needs of its drives.

    Attributes:
        write_bytes_per_second: All stores in half of forward and backward: the paper's figure.
        write_in_forward_bytes_per_second: All stores before forward ends: the stricter one.
        read_bytes_per_second: All loads in backward.
        occupied_bytes: Of all micro-batches that are between forward and backward.
        drives: For the rate of writing as the paper counts it, reading, and room.
        limited_by: Which of them decides: ``write``, ``read`` or ``capacity``.
        hidden_share: What of the bytes the given drives can hide (0 to 1), as the paper counts.
    """

    write_bytes_per_second: float
    write_in_forward_bytes_per_second: float
    read_bytes_per_second: float
    occupied_bytes: float
    drives: int
    limited_by: str
    hidden_share: float


@dataclass(frozen=True, slots=True)
class DriveLife:
    """How long the drives of one rank last, in years of training without a pause.

    Attributes:
        written_bytes_per_second: Mean over the time it is for.
        rated_years: By the rating alone.
        sequential_years: With credit for sequential writes.
        retention_years: With that, and with credit for short retention.
    """

    written_bytes_per_second: float
    rated_years: float
    sequential_years: float
    retention_years: float


def drive_need(
    cluster: ClusterSpec, stored_bytes: float, forward_seconds: float, backward_seconds: float, in_flight: float
) -> DriveNeed:
    """Say what storing everything needs.

    Args:
        cluster: The drives.
        stored_bytes: Of one micro-batch.
        forward_seconds: Of one micro-batch.
        backward_seconds: Of one micro-batch.
        in_flight: Micro-batches between forward and backward.
    """
    write = stored_bytes / ((forward_seconds + backward_seconds) / 2)
    read = stored_bytes / backward_seconds
    occupied = stored_bytes * in_flight
    drive = cluster.drive
    ratios = {
        "write": write / drive.write_bytes_per_second,
        "read": read / drive.read_bytes_per_second,
        "capacity": occupied / drive.capacity_bytes,
    }
    limited_by = max(ratios, key=lambda name: ratios[name])
    return DriveNeed(
        write_bytes_per_second=write,
        write_in_forward_bytes_per_second=stored_bytes / forward_seconds,
        read_bytes_per_second=read,
        occupied_bytes=occupied,
        drives=max(1, math.ceil(ratios[limited_by] - 1e-9)),
        limited_by=limited_by,
        hidden_share=min(1.0, cluster.drives_per_gpu / max(ratios[limited_by], 1e-300)),
    )


def drive_life(cluster: ClusterSpec, written_bytes: float, seconds: float) -> DriveLife:
    """Say how long the drives of one rank last.

    Args:
        cluster: The drives, and the assumptions.
        written_bytes: By one rank.
        seconds: In this time.
    """
    endurance, rate = cluster.endurance, written_bytes / seconds
    rated = math.inf
    if rate > 0:
        rated = cluster.drives_per_gpu * cluster.drive.rated_write_bytes / rate / YEAR_SECONDS
    sequential = rated * endurance.rating_waf / endurance.workload_waf
    return DriveLife(rate, rated, sequential, sequential * endurance.retention_credit)
