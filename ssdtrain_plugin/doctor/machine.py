"""What the machine allows this process: memory, locks, huge pages, system calls, files; and the hosts on it."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ssdtrain_plugin.doctor.accelerators import gpu_finding, visible_gpus
from ssdtrain_plugin.doctor.findings import PROC_ROOT, SYS_ROOT, Finding, chosen_word, first_line, unknown
from ssdtrain_plugin.doctor.packages import apex_finding, megatron_finding
from ssdtrain_plugin.storage.memory_limit import host_memory
from ssdtrain_plugin.units import GIB, TIB, format_bytes

__all__ = ["examine_machine"]

_LITTLE_MEMORY_BYTES = 2 * GIB
_FEW_FILES = 256
_NEARLY_NO_LIMIT_BYTES = 16 * TIB

# io_uring_setup(0, NULL) makes no ring. Where the call is allowed it fails on its arguments.
_ATTEMPT = (
    "import ctypes, os\n"
    "libc = ctypes.CDLL(None, use_errno=True)\n"
    "libc.syscall(425, 0, None)\n"
    "os._exit(ctypes.get_errno())\n"
)
_ATTEMPT_SECONDS = 20.0


def examine_machine(*, proc_root: Path = PROC_ROOT, sys_root: Path = SYS_ROOT) -> tuple[Finding, ...]:
    """Judge what all directories have in common.

    Args:
        proc_root: Where ``/proc`` is.
        sys_root: Where ``/sys`` is.
    """
    return (
        gpu_finding(visible_gpus(), sys_root=sys_root),
        memory_finding(proc_root, sys_root / "fs" / "cgroup"),
        huge_page_finding(sys_root),
        locked_memory_finding(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        file_limit_finding(resource.getrlimit(resource.RLIMIT_FSIZE)[0], resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        io_uring_finding(proc_root),
        megatron_finding(),
        apex_finding(),
    )


def memory_finding(proc_root: Path, cgroup_root: Path) -> Finding:
    """Tell how much host memory may still be taken.

    Args:
        proc_root: Where ``/proc`` is.
        cgroup_root: Where the control groups are mounted.
    """
    memory = host_memory(proc_root, cgroup_root)
    fact = f"{format_bytes(memory.available_bytes)} available"
    if memory.group_bytes is not None and memory.group_bytes < memory.machine_bytes:
        fact += f", left of the limit of {format_bytes(memory.group_limit_bytes or 0)} of {memory.group}"
    fact += "; `host_bytes` of all ranks of the node together must stay below"
    advice = None
    if memory.available_bytes < _LITTLE_MEMORY_BYTES:
        advice = "too little for `host_bytes`, and perhaps for staging; free some, or raise the limit of the container"
    return Finding("host memory", fact, advice)


def huge_page_finding(sys_root: Path) -> Finding:
    """Tell whether staging memory gets huge pages.

    Args:
        sys_root: Where ``/sys`` is.
    """
    name = "huge pages"
    folder = sys_root / "kernel" / "mm" / "transparent_hugepage"
    enabled, defrag = chosen_word(first_line(folder / "enabled")), chosen_word(first_line(folder / "defrag"))
    if enabled is None:
        return unknown(name, f"`{folder}` cannot be read; the kernel may have none")
    if enabled == "never":
        advice = "buffers on small pages halve the bandwidth; write `madvise` to the file `enabled` there, as root"
        return Finding(name, f"never, by {folder}", advice)
    return Finding(name, f"{enabled}, as staging memory asks for them" + (f"; defrag {defrag}" if defrag else ""))


def locked_memory_finding(limit_bytes: int) -> Finding:
    """Tell how much memory the process may lock.

    Args:
        limit_bytes: ``RLIMIT_MEMLOCK``; ``RLIM_INFINITY`` for none.
    """
    name = "memlock limit"
    if limit_bytes == resource.RLIM_INFINITY:
        return Finding(name, "none")
    fact = f"{format_bytes(limit_bytes)}, which bounds the buffers of `io_engine: aio` unless root runs it"
    return Finding(name, fact)


def file_limit_finding(size_bytes: int, count: int) -> Finding:
    """Tell whether the limits of the process are in the way of one large file.

    Args:
        size_bytes: ``RLIMIT_FSIZE``; ``RLIM_INFINITY`` for none.
        count: ``RLIMIT_NOFILE``; ``RLIM_INFINITY`` for none.
    """
    has_size, has_count = size_bytes != resource.RLIM_INFINITY, count != resource.RLIM_INFINITY
    fact = f"size {format_bytes(size_bytes) if has_size else 'without limit'}, "
    fact += f"{count if has_count else 'any number of'} open"
    advices = []
    if has_size and size_bytes < _NEARLY_NO_LIMIT_BYTES:
        advices.append("the extent file cannot grow beyond that size; raise `ulimit -f`")
    if has_count and count < _FEW_FILES:
        advices.append("few files may be open; raise `ulimit -n`")
    return Finding("file limits", fact, "; ".join(advices) or None)


def _attempt_io_uring() -> int:
    """Call ``io_uring_setup`` in a process of its own: a strict filter kills who does.

    Returns:
        The error number, or minus the signal that ended the process.

    Raises:
        OSError: No process can be started.
        subprocess.TimeoutExpired: It did not end.
    """
    command = [sys.executable, "-I", "-S", "-c", _ATTEMPT]
    return subprocess.run(command, capture_output=True, timeout=_ATTEMPT_SECONDS, check=False).returncode


def io_uring_finding(proc_root: Path, attempt: Callable[[], int] = _attempt_io_uring) -> Finding:
    """Tell whether the process may use io_uring. No engine of this release needs it.

    Args:
        proc_root: Where ``/proc`` is.
        attempt: Makes the call and returns the error number, or minus a signal.
    """
    name = "io_uring"
    setting = first_line(proc_root / "sys" / "kernel" / "io_uring_disabled")
    try:
        outcome = attempt()
    except (OSError, subprocess.TimeoutExpired) as error:
        return unknown(name, f"it cannot be tried: {error}")
    if outcome in (errno.EFAULT, errno.EINVAL):
        return Finding(name, "allowed; no engine of this release needs it")
    if outcome == errno.ENOSYS:
        reason = "the kernel has none, or a filter hides it"
    elif outcome == errno.EPERM and setting in ("1", "2"):
        reason = f"kernel.io_uring_disabled is {setting}"
    elif outcome == errno.EPERM:
        reason = "a seccomp filter, as in containers, or a security module refuses it"
    elif outcome == -signal.SIGSYS:
        reason = "a seccomp filter ends the process that tries"
    else:
        return unknown(name, f"the call ended with {os.strerror(outcome) if outcome > 0 else f'signal {-outcome}'}")
    return Finding(name, f"not allowed: {reason}; no engine of this release needs it")
