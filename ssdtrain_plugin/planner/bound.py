"""Lower bounds by linear programming: the least peak without a stall, the least stall for a peak.

Note [The relaxation]
    Let Z(m, t) be the bytes of micro-batch m that are out of device memory at
    time t. Whatever is moved, in whole saves or in parts, to a drive within its
    bandwidth:

    * Z(m, t) is at most E(m, t), the movable bytes that m has saved before t
      and needs after t;
    * between two times, Z grows by no more than what was written meanwhile and
      shrinks by no more than what was read meanwhile;
    * what is written and read in an interval takes no longer than the interval,
      stalls included; with ``mixed_share`` below 1, no longer together either;
    * live bytes are at least R(t) - sum of Z(m, t), where R counts all that is
      saved and not released.

    These are linear. So the optimum over all Z is a lower bound for every
    choice of what to offload, every order of transfers, every amount of
    prefetch. Saves are divisible in it, a transfer frees its bytes while it
    runs, latency is left out, and the bounds of the runtime are too: each makes
    the true optimum larger. Between two nodes R is constant and Z linear, so
    memory is bounded at both ends of each interval only. For one micro-batch
    whose backward is the mirror of its forward, offloading a prefix is as good
    as any choice, and Z says all there is to say; otherwise Z may exchange bytes
    of one micro-batch for others of it at no cost, and the bound is lower.

    A host tier of H bytes lowers any peak by at most H, and never below what
    must be in device memory at some moment.

Needs scipy (extra ``bench``).
"""

from __future__ import annotations

import importlib
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from ssdtrain_plugin.errors import EnvironmentUnsupportedError
from ssdtrain_plugin.planner.machine import Machine
from ssdtrain_plugin.planner.timeline import PointKind, Schedule

__all__ = ["equal_layers_peak", "least_peak", "least_stall"]

# scipy's tolerance is 1e-7 of the numbers of the problem, which are scaled to about 1.
_SOLVER_TOLERANCE = 1e-6


def least_peak(schedule: Schedule, machine: Machine, *, max_nodes: int = 1000) -> float:
    """Bound the peak of live bytes of every plan that does not stall, from below.

    Args:
        schedule: What the stage computes.
        machine: What moves bytes; see Note [The relaxation] for what is left out.
        max_nodes: Look at no more moments than this; fewer give a lower bound and a faster answer.

    Returns:
        Bytes.

    Raises:
        EnvironmentUnsupportedError: scipy is not installed.
    """
    grid = _Grid.of(schedule, max_nodes)
    if grid.total_bytes == 0:
        return 0.0
    program = _Program(grid, machine, fixed_peak_bytes=None)
    peak = program.solve()
    if peak is None:
        # Keeping everything is a solution, so this is the solver's failure; nothing moved is still a bound of no plan.
        return grid.floor_bytes
    return max(grid.floor_bytes, peak * (1.0 - _SOLVER_TOLERANCE) - machine.host_bytes)


def least_stall(schedule: Schedule, machine: Machine, peak_bytes: float, *, max_nodes: int = 1000) -> float:
    """Bound the stall of every plan whose peak is at most ``peak_bytes``, from below.

    Args:
        schedule: What the stage computes. Idle times are not shortened by stalls.
        machine: What moves bytes; see Note [The relaxation] for what is left out.
        peak_bytes: Live bytes that the device can hold.
        max_nodes: As in :func:`least_peak`.

    Returns:
        Seconds; infinite if no amount of waiting brings the peak down so far.

    Raises:
        EnvironmentUnsupportedError: scipy is not installed.
    """
    grid = _Grid.of(schedule, max_nodes)
    if peak_bytes < grid.floor_bytes:
        return math.inf
    if grid.total_bytes == 0:
        return 0.0
    stall = _Program(grid, machine, fixed_peak_bytes=peak_bytes + machine.host_bytes).solve()
    return math.inf if stall is None else max(0.0, stall - _SOLVER_TOLERANCE * schedule.seconds)


def equal_layers_peak(
    num_layers: int, total_bytes: float, forward_seconds: float, backward_seconds: float, machine: Machine
) -> float:
    """Compute the least peak without a stall for one micro-batch of equal layers, in closed form.

    Layer i of n saves s = T / n bytes at the end of its forward, needs them at the
    begin of its backward and releases them at its end. In the time of a layer
    x = W F / n bytes can be written in forward and y = R B / n read in backward.

    At the turn, layers 1 to n-1 have had n-1 layer times for their stores, and what
    is out must come back in n-1 layer times: at most (n-1) min(s, x, y) are out, and
    T minus that is live. Just before the last layer's backward ends, nothing is
    released yet, and what is still out must come back in n-2 layer times: at most
    (n-2) min(s, y) are out. The greater of the two is the peak::

        T - min((n - 1) min(s, x), (n - 2) min(s, y))        n > 1;  s for n = 1

    With bandwidth to spare this is 2 s: one layer in use and the next one loaded.

    Args:
        num_layers: n, at least 1.
        total_bytes: T.
        forward_seconds: F, of all layers.
        backward_seconds: B, of all layers.
        machine: Gives W and R; full duplex.
    """
    layer_bytes = total_bytes / num_layers
    if num_layers == 1:
        return layer_bytes
    written_bytes = machine.write_bytes_per_second * forward_seconds / num_layers
    read_bytes = machine.read_bytes_per_second * backward_seconds / num_layers
    out_at_turn = (num_layers - 1) * min(layer_bytes, written_bytes)
    out_at_first_release = (num_layers - 2) * min(layer_bytes, read_bytes)
    return total_bytes - min(out_at_turn, out_at_first_release)


@dataclass(frozen=True)
class _Grid:
    """The moments at which the program looks.

    Attributes:
        seconds: Of each node.
        live_after: R just after each node.
        live_before: R just before each node.
        away: For each micro-batch, the range of nodes in which it can be away, and E at these nodes.
        floor_bytes: What is in device memory at some moment, whatever the bandwidth.
        total_bytes: Of all saves.
    """

    seconds: list[float]
    live_after: list[int]
    live_before: list[int]
    away: list[tuple[int, list[int]]]
    floor_bytes: float
    total_bytes: int

    @classmethod
    def of(cls, schedule: Schedule, max_nodes: int) -> _Grid:
        seconds, live, away = _walk(schedule)
        # E at a node itself: what was saved before it and is needed after it.
        at_node = [[min(before, after) for before, after in zip([0, *row], row, strict=False)] for row in away]
        live_before = [0, *live[:-1]]
        floor = 0
        for node in range(len(seconds)):
            out = sum(row[node] for row in at_node)
            floor = max(floor, live[node] - out, live_before[node] - out)
        chosen = _choose(len(seconds), max_nodes)
        ranges = []
        for row in at_node:
            inside = [position for position, node in enumerate(chosen) if row[node] > 0]
            first, last = (inside[0], inside[-1] + 1) if inside else (0, 0)
            ranges.append((first, [row[chosen[position]] for position in range(first, last)]))
        return cls(
            seconds=[seconds[node] for node in chosen],
            live_after=[live[node] for node in chosen],
            live_before=[live_before[node] for node in chosen],
            away=ranges,
            floor_bytes=float(floor),
            total_bytes=sum(profile.total_bytes for profile in schedule.profiles),
        )


def _walk(schedule: Schedule) -> tuple[list[float], list[int], list[list[int]]]:
    """For each point: its time, live bytes after it if nothing moves, and what each micro-batch could have out.

    Points at the same time stay apart: a stall may come between the release of
    one save and the need of the next.
    """
    seconds: list[float] = []
    live: list[int] = []
    away: list[list[int]] = [[] for _ in schedule.profiles]
    live_bytes = 0
    away_bytes = [0] * len(schedule.profiles)
    for point in schedule.points():
        if point.kind is PointKind.ANNOUNCE:
            continue
        save = schedule.profiles[point.microbatch].saves[point.number]
        if point.kind is PointKind.SAVE:
            live_bytes += save.nbytes
            away_bytes[point.microbatch] += save.nbytes if save.is_movable else 0
        elif point.kind is PointKind.NEED:
            away_bytes[point.microbatch] -= save.nbytes if save.is_movable else 0
        else:
            live_bytes -= save.nbytes
        seconds.append(point.seconds)
        live.append(live_bytes)
        for row, nbytes in zip(away, away_bytes, strict=True):
            row.append(nbytes)
    return seconds, live, away


def _choose(count: int, max_nodes: int) -> list[int]:
    """Spread nodes evenly over the moments; leaving some out only leaves out constraints."""
    if count <= max_nodes:
        return list(range(count))
    stride = (count - 1) / (max_nodes - 1)
    return [round(number * stride) for number in range(max_nodes)]


class _Program:
    """The linear program; bytes are counted in units of all saves, time in units of the step.

    Args:
        grid: The moments.
        machine: Bandwidths.
        fixed_peak_bytes: None to minimise the peak; otherwise the stall is minimised.
    """

    def __init__(self, grid: _Grid, machine: Machine, *, fixed_peak_bytes: float | None) -> None:
        """Lay out variables and rows."""
        self._grid = grid
        self._fixed_peak = None if fixed_peak_bytes is None else fixed_peak_bytes / grid.total_bytes
        self._scale_seconds = grid.seconds[-1] - grid.seconds[0] or 1.0
        per_step = self._scale_seconds / grid.total_bytes
        self._write_rate = machine.write_bytes_per_second * per_step
        self._read_rate = machine.read_bytes_per_second * per_step
        self._blocked_share = (1.0 - machine.mixed_share) / machine.mixed_share
        self._upper: list[float] = []
        self._cost: list[float] = []
        self._rows: deque[tuple[list[tuple[int, float]], float]] = deque()
        self._result_unit = grid.total_bytes if fixed_peak_bytes is None else self._scale_seconds
        self._build()

    def _variable(self, upper: float = math.inf, cost: float = 0.0) -> int:
        self._upper.append(upper)
        self._cost.append(cost)
        return len(self._upper) - 1

    def _at_most(self, terms: Sequence[tuple[int, float]], limit: float) -> None:
        self._rows.append((list(terms), limit))

    def _build(self) -> None:
        grid = self._grid
        is_peak = self._fixed_peak is None
        peak = self._variable(cost=1.0) if is_peak else -1
        out_at: list[list[tuple[int, float]]] = [[] for _ in grid.seconds]
        writes: list[list[tuple[int, float]]] = [[] for _ in grid.seconds]
        reads: list[list[tuple[int, float]]] = [[] for _ in grid.seconds]
        for first, limits in grid.away:
            self._add_microbatch(first, limits, out_at, writes, reads)
        for node in range(len(grid.seconds)):
            live = max(grid.live_after[node], grid.live_before[node]) / grid.total_bytes
            # R - sum Z <= peak, on both sides of the node.
            terms = [(variable, -1.0) for variable, _ in out_at[node]]
            if is_peak:
                self._at_most([*terms, (peak, -1.0)], -live)
            else:
                self._at_most(terms, (self._fixed_peak or 0.0) - live)
        for node in range(len(grid.seconds) - 1):
            self._add_interval(node, writes[node], reads[node], has_stall=not is_peak)

    def _add_microbatch(
        self,
        first: int,
        limits: list[int],
        out_at: list[list[tuple[int, float]]],
        writes: list[list[tuple[int, float]]],
        reads: list[list[tuple[int, float]]],
    ) -> None:
        """Add Z at each node, and what is written and read between two of them."""
        before: list[tuple[int, float]] = []
        for offset, limit in enumerate([*limits, 0]):
            node = first + offset
            now: list[tuple[int, float]] = []
            if limit > 0:
                now = [(self._variable(upper=limit / self._grid.total_bytes), 1.0)]
                out_at[node] += now
            if node > 0 and (now or before):
                written, read = self._variable(), self._variable()
                writes[node - 1].append((written, 1.0))
                reads[node - 1].append((read, 1.0))
                change = [*now, *((variable, -1.0) for variable, _ in before)]
                self._at_most([*change, (written, -1.0)], 0.0)
                self._at_most([*((variable, -factor) for variable, factor in change), (read, -1.0)], 0.0)
            before = now

    def _add_interval(
        self, node: int, writes: list[tuple[int, float]], reads: list[tuple[int, float]], *, has_stall: bool
    ) -> None:
        """Bound what is moved between a node and the next one by the time there is."""
        length = (self._grid.seconds[node + 1] - self._grid.seconds[node]) / self._scale_seconds
        stall = [(self._variable(cost=1.0), -1.0)] if has_stall else []
        write_terms = [(variable, 1.0 / self._write_rate) for variable, _ in writes]
        read_terms = [(variable, 1.0 / self._read_rate) for variable, _ in reads]
        share = self._blocked_share
        for own, other in ((write_terms, read_terms), (read_terms, write_terms)):
            blocked = [(variable, share * factor) for variable, factor in other] if share else []
            if own:
                self._at_most([*own, *blocked, *stall], length)

    def solve(self) -> float | None:
        """Solve it.

        Returns:
            Bytes of peak or seconds of stall; None if there is no solution.

        Raises:
            EnvironmentUnsupportedError: scipy is not installed.
        """
        optimize, sparse = _scipy("optimize"), _scipy("sparse")
        row_numbers, columns, factors, limits = [], [], [], []
        for number, (terms, limit) in enumerate(self._rows):
            limits.append(limit)
            for variable, factor in terms:
                row_numbers.append(number)
                columns.append(variable)
                factors.append(factor)
        shape = (len(limits), len(self._upper))
        matrix = sparse.csr_array((factors, (row_numbers, columns)), shape=shape)
        bounds = [(0.0, None if math.isinf(upper) else upper) for upper in self._upper]
        result = optimize.linprog(self._cost, A_ub=matrix, b_ub=limits, bounds=bounds, method="highs")
        return float(result.fun) * self._result_unit if result.status == 0 else None


def _scipy(part: str) -> ModuleType:
    """Import a part of scipy, which only bounds need."""
    try:
        return importlib.import_module(f"scipy.{part}")
    except ImportError as error:
        raise EnvironmentUnsupportedError(
            "cannot compute a lower bound: scipy is not installed",
            hint="pip install 'ssdtrain-plugin[bench]'",
        ) from error
