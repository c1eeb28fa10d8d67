"""Files that nobody may find, on file systems that want a name for them."""

import errno
import fcntl
import os
import stat
import tempfile
from pathlib import Path

import pytest

from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.preflight import check
from ssdtrain_plugin.storage import scratch as scratch_module
from ssdtrain_plugin.storage.extent_file import ExtentFile
from ssdtrain_plugin.storage.owners import new_name, this_process
from ssdtrain_plugin.storage.probe import directory_problem, probe_directory
from ssdtrain_plugin.storage.scratch import file_system_of, open_scratch
from ssdtrain_plugin.units import MIB

NOBODY = 65534
TOKEN = "0" * 32


def refuse_tmpfile(monkeypatch):
    real = os.open

    def fake(path, flags, mode=0o777, **options):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
        return real(path, flags, mode, **options)

    monkeypatch.setattr(os, "open", fake)


def refuse_unlink(monkeypatch):
    """Refuse to take the name of an open file away, as some file systems do."""
    monkeypatch.setattr(scratch_module.os, "unlink", _busy)


def _busy(path, **options):
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)


@pytest.fixture
def nameful(monkeypatch):
    """A machine on which every file has a name until it is closed."""
    refuse_tmpfile(monkeypatch)
    monkeypatch.setattr(scratch_module, "_works_unlinked", lambda fd: False)


def our_folder(directory, *, mode=0o700, uid=None):
    folder = directory / f".ssdtrain-{os.geteuid() if uid is None else uid}-{TOKEN}"
    folder.mkdir()
    folder.chmod(mode)
    return folder


def dead_name():
    """Name a file of a process that has ended."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    me = this_process()
    return new_name(type(me)(me.boot, me.name_space, child, me.start_ticks))


def names_in(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_a_name_that_stays_is_ours_alone_and_goes_with_the_file(tmp_path, nameful):
    scratch = open_scratch(str(tmp_path), direct=False)
    assert scratch.how == "named"
    folder, file = names_in(tmp_path)
    assert stat.S_IMODE(os.stat(tmp_path / folder).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(tmp_path / file).st_mode) == 0o600
    other = open_scratch(str(tmp_path), direct=False)
    assert len(names_in(tmp_path)) == 3, "one folder, two files"
    scratch.close()
    assert len(names_in(tmp_path)) == 2
    other.close()
    assert names_in(tmp_path) == []


def test_names_and_folders_cannot_be_foreseen(tmp_path, nameful):
    seen = set()
    for _ in range(5):
        scratch = open_scratch(str(tmp_path), direct=False)
        seen.update(part for path in names_in(tmp_path) for part in path.split("/"))
        scratch.close()
    assert len(seen) == 10


def test_the_mode_is_right_from_birth_whatever_the_umask(tmp_path, nameful, monkeypatch):
    modes = []
    real = os.open

    def watching(path, flags, mode=0o777, **options):
        fd = real(path, flags, mode, **options)
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL
            assert flags & os.O_NOFOLLOW
            modes.append(stat.S_IMODE(os.fstat(fd).st_mode))
        return fd

    monkeypatch.setattr(os, "open", watching)
    before = os.umask(0)
    try:
        open_scratch(str(tmp_path), direct=False).close()
    finally:
        os.umask(before)
    assert set(modes) == {0o600}


def test_a_file_that_cannot_lose_its_name_keeps_it_until_it_is_closed(tmp_path, monkeypatch):
    refuse_tmpfile(monkeypatch)
    with monkeypatch.context() as refused:
        refuse_unlink(refused)
        scratch = open_scratch(str(tmp_path), direct=False)
    assert scratch.how == "named"
    os.pwrite(scratch.fd, b"bytes", 0)
    scratch.close()
    assert names_in(tmp_path) == []


def test_a_forked_child_leaves_the_name_to_its_parent(tmp_path, nameful):
    scratch = open_scratch(str(tmp_path), direct=False)
    child = os.fork()
    if child == 0:
        scratch.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert len(names_in(tmp_path)) == 2
    scratch.close()
    assert names_in(tmp_path) == []


def test_the_extent_file_takes_its_name_with_it(tmp_path, nameful):
    file = ExtentFile(probe_directory(str(tmp_path)), MIB)
    file.allocate(4096)
    assert len(names_in(tmp_path)) == 2
    file.close()
    assert names_in(tmp_path) == []


def test_a_name_that_cannot_go_before_the_descriptor_goes_after_it(tmp_path, monkeypatch):
    refuse_tmpfile(monkeypatch)
    real = os.unlink
    scratch = None

    def while_closed(path, **options):
        try:
            os.fstat(scratch.fd) if scratch is not None else None
        except OSError:
            return real(path, **options)
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)

    monkeypatch.setattr(os, "unlink", while_closed)
    scratch = open_scratch(str(tmp_path), direct=False)
    assert len(names_in(tmp_path)) == 2
    scratch.close()
    assert names_in(tmp_path) == []


def test_the_name_goes_with_close_though_a_transfer_hangs(tmp_path, nameful):
    file = ExtentFile(probe_directory(str(tmp_path)), MIB)
    extent = file.allocate(4096)
    with file.transfer(extent):
        file.close()
        assert names_in(tmp_path) == []
        assert os.fstat(file.fd).st_nlink == 0, "still open: a late write must hit no other file"
    assert file.is_unused


# --- stale files


def test_files_of_dead_processes_go_and_all_others_stay(tmp_path, nameful):
    folder = our_folder(tmp_path)
    stale = folder / dead_name()
    stale.write_bytes(bytes(4096))
    (folder / "checkpoint.pt").write_text("kept", encoding="ascii")
    (folder / new_name(this_process())).write_text("alive", encoding="ascii")
    (folder / new_name(None)).write_text("of nobody", encoding="ascii")
    (tmp_path / dead_name()).write_text("outside of our folder", encoding="ascii")
    before = names_in(tmp_path)
    open_scratch(str(tmp_path), direct=False).close()
    assert set(before) - set(names_in(tmp_path)) == {str(stale.relative_to(tmp_path))}


def test_what_is_left_of_a_killed_process_goes_with_its_folder(tmp_path, nameful):
    folder = our_folder(tmp_path)
    (folder / dead_name()).write_bytes(bytes(4096))
    assert directory_problem(str(tmp_path)) is None
    assert names_in(tmp_path) == []


def test_a_stale_file_that_a_child_still_holds_stays(tmp_path, nameful):
    folder = our_folder(tmp_path)
    held = folder / dead_name()
    with held.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        open_scratch(str(tmp_path), direct=False).close()
        assert held.exists()
    open_scratch(str(tmp_path), direct=False).close()
    assert not held.exists()


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "folder", "pipe"])
def test_what_is_no_file_of_ours_is_not_touched(tmp_path, nameful, kind):
    drive, target = tmp_path / "drive", tmp_path / "target"
    drive.mkdir()
    name = our_folder(drive) / dead_name()
    if kind == "link to a file":
        target.write_text("precious", encoding="ascii")
        name.symlink_to(target)
    elif kind == "link to a folder":
        target.mkdir()
        (target / dead_name()).write_text("precious", encoding="ascii")
        name.symlink_to(target)
    elif kind == "folder":
        name.mkdir()
    else:
        os.mkfifo(name)
    before = names_in(tmp_path)
    open_scratch(str(drive), direct=False).close()
    assert names_in(tmp_path) == before


def test_a_link_in_the_place_of_our_folder_is_not_followed(tmp_path, nameful):
    drive, target = tmp_path / "drive", tmp_path / "target"
    drive.mkdir()
    target.mkdir(mode=0o700)
    precious = target / dead_name()
    precious.write_text("precious", encoding="ascii")
    (drive / f".ssdtrain-{os.geteuid()}-{TOKEN}").symlink_to(target)
    scratch = open_scratch(str(drive), direct=False)
    assert names_in(target) == [precious.name]
    scratch.close()
    assert precious.exists()


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777])
def test_a_folder_that_others_may_enter_is_not_used(tmp_path, nameful, mode):
    folder = our_folder(tmp_path, mode=mode)
    (folder / dead_name()).write_text("of whom?", encoding="ascii")
    before = os.listdir(folder)
    scratch = open_scratch(str(tmp_path), direct=False)
    assert os.listdir(folder) == before
    scratch.close()


def test_a_folder_of_somebody_else_is_not_used(tmp_path, nameful):
    if os.geteuid() != 0:
        pytest.skip("needs root to make a directory of another user")
    folder = our_folder(tmp_path)
    (folder / dead_name()).write_text("theirs", encoding="ascii")
    os.chown(folder, NOBODY, NOBODY)
    scratch = open_scratch(str(tmp_path), direct=False)
    assert len(os.listdir(folder)) == 1
    scratch.close()
    assert len(os.listdir(folder)) == 1


def test_another_user_can_neither_see_nor_open_what_has_a_name(nameful):
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    with tempfile.TemporaryDirectory() as name:  # others may not enter pytest's own
        shared = Path(name)
        shared.chmod(0o1777)
        scratch = open_scratch(name, direct=False)
        os.pwrite(scratch.fd, b"secret", 0)
        folder, file = names_in(shared)
        os.seteuid(NOBODY)
        try:
            with pytest.raises(PermissionError):
                os.listdir(shared / folder)
            with pytest.raises(PermissionError):
                os.open(shared / file, os.O_RDONLY)
            open_scratch(name, direct=False).close()
        finally:
            os.seteuid(0)
        scratch.close()
        assert names_in(shared) == []


def test_our_folder_may_go_in_between(tmp_path, nameful, monkeypatch):
    """1. A process finds the folder. 2. Another one's last file goes, and the folder. 3. The first makes a new one."""
    our_folder(tmp_path)
    real, calls = scratch_module._remove_stale, []

    def racing(fd, **options):
        if not calls:
            os.rmdir(tmp_path / f".ssdtrain-{os.geteuid()}-{TOKEN}")
        calls.append(fd)
        real(fd, **options)

    monkeypatch.setattr(scratch_module, "_remove_stale", racing)
    open_scratch(str(tmp_path), direct=False).close()
    assert len(calls) == 2
    assert names_in(tmp_path) == []


def test_the_file_system_here_is_known(tmp_path):
    assert file_system_of(str(tmp_path)) != "unknown"


# --- directories that anybody may change


def test_a_directory_that_anybody_may_change_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    tmp_path.chmod(0o777)
    monkeypatch.setattr(os, "open", lambda *args, **options: pytest.fail("a file was opened"))
    with pytest.raises(ConfigError) as caught:
        check({"paths": str(tmp_path)}, source="a test", local_rank=0)
    monkeypatch.undo()
    assert "mode 0777, every user may rename and remove what is in it" in str(caught.value)
    assert "`chmod +t`" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("mode", [0o1777, 0o770, 0o700, 0o755])
def test_directories_with_the_sticky_bit_or_without_strangers_are_fine(tmp_path, mode):
    tmp_path.chmod(mode)
    assert directory_problem(str(tmp_path)) is None
