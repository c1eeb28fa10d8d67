"""Tables of what the doctor found, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from ssdtrain_plugin.doctor.diagnosis import Diagnosis
from ssdtrain_plugin.doctor.findings import Finding
from ssdtrain_plugin.doctor.prediction import Prediction
from ssdtrain_plugin.units import format_bytes, format_rate, format_seconds

__all__ = ["directory_table", "machine_table", "prediction_table"]


def directory_table(diagnosis: Diagnosis) -> Table:
    """Show one usable directory.

    Args:
        diagnosis: From :func:`ssdtrain_plugin.doctor.examine`.
    """
    bandwidth = diagnosis.bandwidth
    rows = list(diagnosis.findings)
    if bandwidth is not None:
        how = (
            f"{format_bytes(bandwidth.nbytes)} in extents of {format_bytes(bandwidth.extent_bytes)}, "
            f"{bandwidth.threads} threads"
        )
        first = format_rate(bandwidth.first_write_bytes_per_second)
        rows += [
            Finding("write", f"{format_rate(bandwidth.write_bytes_per_second)} ({first} into new space)"),
            Finding("read", format_rate(bandwidth.read_bytes_per_second)),
            Finding("measured with", how),
        ]
    rows.append(Finding("io_engine: auto", f"{diagnosis.engine}: {diagnosis.engine_reason}"))
    return _table(diagnosis.path, rows)


def machine_table(findings: Sequence[Finding]) -> Table:
    """Show what all directories have in common.

    Args:
        findings: From :func:`ssdtrain_plugin.doctor.examine_machine`.
    """
    return _table("this machine", findings)


def prediction_table(prediction: Prediction) -> Table:
    """Show a prediction, and that it is one.

    Args:
        prediction: From :func:`ssdtrain_plugin.doctor.predict`.
    """
    shape = prediction.shape
    model = (
        f"{shape['layers']} layers of {shape['hidden']}, {shape['heads']} heads, "
        f"{shape['micro_batch']} x {shape['sequence']} tokens, {8 * shape['bytes_per_element']}-bit, "
        f"{shape['tflops']:g} TFLOP/s"
    )
    saved = f"{format_bytes(prediction.saved_bytes)} a micro-batch, without embeddings and loss"
    drives = (
        "the directory" if prediction.num_directories == 1 else f"{prediction.num_directories} directories, added up,"
    )
    hidden = f"{prediction.hidden_fraction:.0%} of the bytes hidden behind compute"
    rows = [
        Finding("model", model),
        Finding("saved for backward", saved),
        _way("store", prediction.store_seconds, "forward", prediction.forward_seconds),
        _way("load", prediction.load_seconds, "backward", prediction.backward_seconds),
        Finding("needed write", _need(prediction.needed_write_bytes_per_second, prediction.write_bytes_per_second)),
        Finding("needed read", _need(prediction.needed_read_bytes_per_second, prediction.read_bytes_per_second)),
        Finding("policy: all", f"{prediction.overhead_fraction:+.1%} of a step, {hidden}", prediction.advice),
    ]
    return _table(f"prediction, not a measurement: one rank that has {drives} for itself", rows)


def _way(name: str, seconds: float, phase: str, compute_seconds: float) -> Finding:
    return Finding(name, f"{format_seconds(seconds)}, while {phase} computes {format_seconds(compute_seconds)}")


def _need(needed: float, measured: float) -> str:
    return f"{format_rate(needed)}, measured {format_rate(measured)}"


def _table(title: str, rows: Sequence[Finding]) -> Table:
    table = Table(title=escape(title), title_justify="left", show_header=False, box=None)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        text = escape(row.fact)
        if row.advice:
            text += f"\n[yellow]advice: {escape(row.advice)}[/]"
        table.add_row(escape(row.name), text)
    return table
