"""A directory is judged by what it does, on real file systems with real faults."""

import contextlib
import errno
import os
import re
import stat
import subprocess

import pytest

from ssdtrain_plugin.storage.probe import directory_problem, probe_directory
from ssdtrain_plugin.storage.scratch import open_scratch
from ssdtrain_plugin.units import MIB


@contextlib.contextmanager
def mounted_tmpfs(point, options):
    """Mount a tmpfs for the duration of a block, or skip the test where that is impossible."""
    point.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
    try:
        mount = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mount.returncode:
        pytest.skip(f"cannot mount here: {mount.stderr.strip()}")
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True)


def refuse(monkeypatch, wanted, error_number, *, leaves_file=False):
    """Make os.open refuse calls whose flags hold all bits of ``wanted``."""
    real = os.open

    def fake(path, flags, mode=0o777, **options):
        if flags & wanted == wanted:
            if leaves_file and flags & os.O_CREAT:
                os.close(real(path, flags & ~wanted, mode, **options))
            raise OSError(error_number, os.strerror(error_number), path)
        return real(path, flags, mode, **options)

    monkeypatch.setattr(os, "open", fake)


def test_a_good_directory_has_no_problem_and_stays_empty(tmp_path):
    assert directory_problem(str(tmp_path)) is None
    report = probe_directory(str(tmp_path))
    assert report.is_writable
    assert 0 < report.free_bytes <= report.total_bytes
    assert report.file_system != "unknown"
    assert os.listdir(tmp_path) == []


def test_a_relative_path_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert directory_problem(".") is None
    assert probe_directory(".").path == "."


def test_the_alignment_is_one_that_works(tmp_path):
    report = probe_directory(str(tmp_path))
    if not report.supports_direct:
        pytest.skip(f"O_DIRECT: {report.direct_reason}")
    assert report.alignment_bytes in {512, 1024, 2048, 4096, 8192, 16384, 32768, 65536}
    assert report.direct_reason == f"works with {report.alignment_bytes}-byte alignment"


def test_a_missing_directory(tmp_path):
    path = tmp_path / "missing"
    assert directory_problem(str(path)) == (f"`{path}`: no such directory (expected a writable directory on the drive)")
    with pytest.raises(FileNotFoundError):
        probe_directory(str(path))


def test_a_file_is_not_a_directory(tmp_path):
    path = tmp_path / "file"
    path.write_text("kept", encoding="ascii")
    assert "not a directory" in directory_problem(str(path))
    assert "not a directory" in directory_problem(str(path / "below"))
    assert path.read_text(encoding="ascii") == "kept"


def test_a_path_with_a_null_character():
    assert "null" in directory_problem("a\0b")


def test_a_directory_of_somebody_else(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    os.chmod(tmp_path, 0o700)
    os.seteuid(65534)
    try:
        problem = directory_problem(str(tmp_path))
    finally:
        os.seteuid(0)
    assert problem == f"`{tmp_path}`: not writable by user 65534 (expected permission to create files)"


def test_a_read_only_file_system(tmp_path):
    with mounted_tmpfs(tmp_path / "ro", "size=128m,ro") as point:
        assert "read-only file system" in directory_problem(str(point))
        report = probe_directory(str(point))
        assert not report.is_writable
        assert not report.supports_direct


def test_a_full_file_system(tmp_path):
    with mounted_tmpfs(tmp_path / "full", "size=1m") as point:
        with open(point / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(bytes(4096)):
                pass
        assert "file system is full" in directory_problem(str(point))
        assert not probe_directory(str(point)).is_writable
        assert os.listdir(point) == ["ballast"]


def test_a_file_system_with_little_space(tmp_path):
    with mounted_tmpfs(tmp_path / "small", "size=32m") as point:
        assert re.search(r"only 32\.0 MiB free \(expected at least 64\.0 MiB\)", directory_problem(str(point)))
        assert probe_directory(str(point)).total_bytes == 32 * MIB


def test_the_file_system_is_that_of_the_longest_mount_point(tmp_path):
    with mounted_tmpfs(tmp_path / "a mount", "size=128m") as point:
        (point / "below").mkdir()
        assert probe_directory(str(point / "below")).file_system == "tmpfs"
        (tmp_path / "a mount 2").mkdir()
        assert probe_directory(str(tmp_path / "a mount 2")).file_system == probe_directory(str(tmp_path)).file_system


@pytest.mark.parametrize("refused", [None, errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT])
@pytest.mark.parametrize("direct", [False, True])
def test_a_file_without_a_name(tmp_path, monkeypatch, refused, direct):
    if direct and not probe_directory(str(tmp_path)).supports_direct:
        pytest.skip("no O_DIRECT here")
    if refused is not None:
        refuse(monkeypatch, os.O_TMPFILE, refused)
    scratch = open_scratch(str(tmp_path), direct=direct)
    fd, how = scratch.fd, scratch.how
    try:
        assert os.listdir(tmp_path) == []
        status = os.fstat(fd)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_nlink == 0
        assert not os.get_inheritable(fd)
        assert refused is None or how == "unlinked"
    finally:
        os.close(fd)
    assert os.listdir(tmp_path) == []


def test_a_refused_o_direct_leaves_no_file(tmp_path, monkeypatch):
    """1. No O_TMPFILE. 2. O_CREAT makes the file, then O_DIRECT is refused. 3. The file must go."""
    refuse(monkeypatch, os.O_DIRECT, errno.EINVAL, leaves_file=True)
    refuse(monkeypatch, os.O_TMPFILE, errno.EOPNOTSUPP)
    with pytest.raises(OSError, match="Invalid argument"):
        open_scratch(str(tmp_path), direct=True)
    assert os.listdir(tmp_path) == []


def test_o_direct_refused_at_open_is_reported(tmp_path, monkeypatch):
    refuse(monkeypatch, os.O_DIRECT, errno.EINVAL)
    report = probe_directory(str(tmp_path))
    assert report.is_writable
    assert (report.supports_direct, report.alignment_bytes) == (False, 1)
    assert report.direct_reason == "refused by the file system: Invalid argument"


def test_the_first_alignment_that_is_accepted_is_reported(tmp_path, monkeypatch):
    real = os.pwritev

    def wants_4096(fd, buffers, offset, *flags):
        if offset % 4096:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "pwritev", wants_4096)
    report = probe_directory(str(tmp_path))
    if not report.supports_direct:
        pytest.skip("no O_DIRECT here")
    assert report.alignment_bytes == 4096


def test_o_direct_that_opens_but_does_not_move_bytes_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: 0)
    report = probe_directory(str(tmp_path))
    assert not report.supports_direct


def test_a_directory_that_exists_but_takes_no_files_is_not_called_missing():
    expected = "takes no new files" if os.geteuid() == 0 else "not writable by user"
    assert expected in directory_problem("/proc")
