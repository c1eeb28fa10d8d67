"""Which engine moves the bytes to a drive, and why that one."""

from __future__ import annotations

from ssdtrain_plugin.storage.probe import DirectoryReport

__all__ = ["choose_engine"]


def choose_engine(wanted: str, report: DirectoryReport) -> tuple[str, str]:
    """Choose the engine for a directory.

    Args:
        wanted: The option ``io_engine``. A named engine is used; ``auto`` picks one.
        report: What the directory can do.

    Returns:
        The engine, and the reason in a few words.
    """
    access = "with O_DIRECT" if report.supports_direct else f"buffered, because O_DIRECT {report.direct_reason}"
    reason = f"plain system calls {access}, the one engine of this release" if wanted == "auto" else "asked for"
    return "posix", reason
