"""fio beside us: what it prints is read, what it is asked is fair, and nothing of it stays."""

import os
import shutil
import subprocess

import pytest
from fake_fio import install
from hypothesis import given
from hypothesis import strategies as st

from ssdtrain_plugin.bench import fio, fio_process
from ssdtrain_plugin.bench.fio import (
    FioError,
    FioJob,
    FioProgram,
    find_fio,
    parse_fio,
    run_fio,
    with_working_engine,
)
from ssdtrain_plugin.storage.scratch import open_scratch
from ssdtrain_plugin.units import GIB, KIB

BLOCK_BYTES = 64 * KIB

# What fio 3.33 printed for two jobs at once, less the fields that nobody reads.
CANNED = """\
fio: this is a note that stands before the report
{
  "fio version" : "fio-3.33",
  "timestamp" : 1795188976,
  "jobs" : [
    {
      "jobname" : "job0", "groupid" : 0, "error" : 0, "elapsed" : 1,
      "job options" : { "name" : "job0", "rw" : "write" },
      "read" : { "io_bytes" : 0, "bw_bytes" : 0, "runtime" : 0, "total_ios" : 0 },
      "write" : { "io_bytes" : 536870912, "bw_bytes" : 4294967296, "runtime" : 125, "total_ios" : 32 },
      "job_runtime" : 125, "usr_cpu" : 4.000000, "sys_cpu" : 12.000000, "ctx" : 40
    },
    {
      "jobname" : "job1", "groupid" : 0, "error" : 0, "elapsed" : 1,
      "job options" : { "name" : "job1", "rw" : "read" },
      "read" : { "io_bytes" : 536870912, "bw_bytes" : 2147483648, "runtime" : 250, "total_ios" : 32 },
      "write" : { "io_bytes" : 0, "bw_bytes" : 0, "runtime" : 0, "total_ios" : 0 },
      "job_runtime" : 250, "usr_cpu" : 2.000000, "sys_cpu" : 6.000000, "ctx" : 41
    }
  ],
  "disk_util" : [ { "name" : "vda", "util" : 99.100000 } ]
}
"""


@pytest.fixture
def fake_fio(tmp_path_factory, monkeypatch):
    return install(tmp_path_factory.mktemp("fake-fio"), monkeypatch)


@pytest.fixture
def fd(tmp_path):
    fd = open_scratch(str(tmp_path), direct=False).fd
    os.posix_fallocate(fd, 0, 4 * BLOCK_BYTES)
    yield fd
    os.close(fd)


# --- what it prints


def test_bytes_and_processor_time_of_all_jobs_over_the_time_of_the_longest():
    sample = parse_fio(CANNED)
    assert sample.nbytes == GIB
    assert sample.seconds == 0.25
    assert sample.cpu_seconds == pytest.approx(0.125 * 0.16 + 0.25 * 0.08)
    assert sample.bytes_per_second == 4 * GIB
    assert sample.cpu_seconds_per_gib == pytest.approx(0.04)


def test_an_error_of_one_job_is_an_error():
    with pytest.raises(FioError, match="job1: No space left on device"):
        parse_fio(CANNED.replace('"job1", "groupid" : 0, "error" : 0', '"job1", "groupid" : 0, "error" : 28'))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fio: nothing",
        "{",
        "[]",
        "{}",
        '{"jobs": []}',
        CANNED.replace("usr_cpu", "cpu"),
        CANNED.replace("125,", "null,"),
        CANNED[:-40],
    ],
)
def test_what_is_no_report_is_an_error_of_fio_and_not_of_ours(text):
    with pytest.raises(FioError, match="cannot read what fio printed"):
        parse_fio(text)


# --- finding it


def test_without_fio_there_is_none(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert find_fio() is None


def test_a_program_that_does_not_start_is_none(tmp_path, monkeypatch):
    broken = tmp_path / "fio"
    broken.write_text("#!/nonexistent\n")
    broken.chmod(0o700)
    monkeypatch.setattr(shutil, "which", lambda name: str(broken))
    assert find_fio() is None


def test_its_best_engine_that_works_is_used(fake_fio, fd):
    fake_fio.order(engines=["psync", "libaio", "io_uring", "rados"])
    program = find_fio()
    assert (program.version, program.engines) == ("fio-9.9", ("io_uring", "libaio", "psync"))
    fake_fio.order(refused_engine="io_uring")
    program = with_working_engine(program, FioJob(fd, False, 0, BLOCK_BYTES), BLOCK_BYTES)
    assert program.engine == "libaio"


def test_when_no_engine_works_the_last_error_is_raised(fake_fio, fd):
    fake_fio.order(engines=["psync"], fails_from_call=1)
    job = FioJob(fd, False, 0, BLOCK_BYTES)
    with pytest.raises(FioError, match="fio failed: fio: engine not available here"):
        with_working_engine(find_fio(), job, BLOCK_BYTES)


def test_a_build_without_any_of_the_engines_is_none(fake_fio):
    fake_fio.order(engines=["rados", "null"])
    assert find_fio() is None


# --- what it is asked


def test_it_gets_the_same_block_depth_direction_and_bytes_and_buffers_in_huge_pages(fake_fio, fd, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    monkeypatch.setattr(fio, "_reserved_huge_page_bytes", lambda: 0)
    jobs = [
        FioJob(fd, True, 0, 2 * BLOCK_BYTES),
        FioJob(fd, False, 2 * BLOCK_BYTES, 2 * BLOCK_BYTES, is_direct=False),
    ]
    sample, _ = run_fio(find_fio(), jobs, block_bytes=BLOCK_BYTES, depth=3)
    assert sample.nbytes == 4 * BLOCK_BYTES
    (call,) = fake_fio.calls
    assert call["tunables"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    both = " ".join(call["arguments"]).split("--name=")[1:]
    for text, wanted in zip(
        both,
        [
            ("--rw=write", "--offset=0 ", "--direct=1"),
            ("--rw=rw --rwmixread=100", f"--offset={2 * BLOCK_BYTES} ", "--direct=0"),
        ],
        strict=True,
    ):
        for option in (*wanted, f"--bs={BLOCK_BYTES} ", "--iodepth=3 ", f"--size={2 * BLOCK_BYTES} "):
            assert option in text
        for option in ("--ioengine=io_uring", "--scramble_buffers=0", "--allow_file_create=0", "--mem_align=2093056"):
            assert option in text


def test_reserved_huge_pages_are_used_where_there_are_enough(fake_fio, fd, monkeypatch):
    job = FioJob(fd, True, 0, BLOCK_BYTES)
    for reserved_bytes, is_used in ((GIB, True), (1, False)):
        monkeypatch.setattr(fio, "_reserved_huge_page_bytes", lambda reserved_bytes=reserved_bytes: reserved_bytes)
        run_fio(find_fio(), [job], block_bytes=BLOCK_BYTES, depth=1)
        assert ("--mem=mmaphuge" in fake_fio.calls[-1]["arguments"]) is is_used


@given(blocks=st.integers(1, 100), depth=st.integers(1, 16), offset=st.integers(0, 10))
def test_a_synchronous_engine_gets_its_depth_in_processes_that_share_the_bytes(blocks, depth, offset):
    job = FioJob(3, True, offset * BLOCK_BYTES, blocks * BLOCK_BYTES)
    parts = fio._split(job, "psync", BLOCK_BYTES, depth)
    assert len(parts) == min(blocks, depth)
    assert [part.offset for part in parts[1:]] == [part.offset + part.nbytes for part in parts[:-1]]
    assert (parts[0].offset, parts[-1].offset + parts[-1].nbytes) == (job.offset, job.offset + job.nbytes)
    assert all(part.nbytes % BLOCK_BYTES == 0 and part.nbytes > 0 for part in parts)
    assert fio._split(job, "io_uring", BLOCK_BYTES, depth) == [job]


# --- when it fails


def test_bytes_that_it_did_not_move_are_an_error(fake_fio, fd):
    fake_fio.order(loses_bytes=1)
    with pytest.raises(FioError, match=f"fio moved {BLOCK_BYTES - 1} bytes \\(expected {BLOCK_BYTES}\\)"):
        run_fio(find_fio(), [FioJob(fd, True, 0, BLOCK_BYTES)], block_bytes=BLOCK_BYTES, depth=1)


def test_a_program_that_has_gone_is_an_error_of_fio(fd, tmp_path):
    program = FioProgram(str(tmp_path / "gone"), "fio-9.9", ("psync",))
    with pytest.raises(FioError, match=r"cannot run fio: .*No such file"):
        run_fio(program, [FioJob(fd, True, 0, BLOCK_BYTES)], block_bytes=BLOCK_BYTES, depth=1)


@pytest.fixture
def started(monkeypatch):
    """Every process that is started."""
    processes, real = [], subprocess.Popen

    def popen(*arguments, **options):
        processes.append(real(*arguments, **options))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    return processes


def test_one_that_hangs_is_ended(fake_fio, fd, started, monkeypatch):
    program = find_fio()
    fake_fio.order(hangs=True)
    monkeypatch.setattr(fio_process, "_LEAST_TIMEOUT_SECONDS", 0.0)
    with pytest.raises(FioError, match="does not end"):
        run_fio(program, [FioJob(fd, True, 0, BLOCK_BYTES)], block_bytes=BLOCK_BYTES, depth=1)
    assert started[-1].poll() is not None


def test_an_interrupt_ends_it(fake_fio, fd, started, monkeypatch):
    program = find_fio()
    fake_fio.order(hangs=True)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fio_process, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_fio(program, [FioJob(fd, True, 0, BLOCK_BYTES)], block_bytes=BLOCK_BYTES, depth=1)
    assert started[-1].poll() is not None


# --- one start


def waiting_shells(start, count):
    """Processes that do what a job of fio does before it begins."""
    (option,) = start.options
    command = option.partition("=")[2]
    return [subprocess.Popen(["/bin/sh", "-c", command], pass_fds=start.inherited) for _ in range(count)]


@pytest.fixture
def start():
    start = fio_process._Start()
    yield start
    start.close()


def test_jobs_begin_when_all_are_ready_and_not_before(start):
    shells = waiting_shells(start, 1)
    assert os.read(start._ready, 1) == b"\n"  # it has said so, and now it waits
    assert shells[0].poll() is None
    shells += waiting_shells(start, 1)
    start.release(1)
    assert [shell.wait(20) for shell in shells] == [0, 0]


def test_a_job_that_ends_before_it_is_ready_holds_nobody_back(start):
    shells = [subprocess.Popen(["/bin/true"], pass_fds=start.inherited)]
    start.release(2)
    assert shells[0].wait(20) == 0


def test_a_job_that_is_never_ready_holds_the_others_back_for_some_time_only(start, monkeypatch):
    monkeypatch.setattr(fio_process, "_START_SECONDS", 0.0)
    shells = waiting_shells(start, 1)
    start.release(2)
    assert shells[0].wait(20) == 0


def test_an_interrupt_while_jobs_wait_lets_them_go(start, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    shells = waiting_shells(start, 1)
    monkeypatch.setattr(fio_process.select, "select", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start.release(1)
    assert shells[0].wait(20) == 0


def test_jobs_that_run_together_have_one_start_and_one_alone_has_none(fake_fio, fd):
    job = FioJob(fd, True, 0, BLOCK_BYTES)
    run_fio(find_fio(), [job, job], block_bytes=BLOCK_BYTES, depth=1)
    run_fio(find_fio(), [job], block_bytes=BLOCK_BYTES, depth=1)
    counts = [sum(option.startswith("--exec_prerun=") for option in call["arguments"]) for call in fake_fio.calls]
    assert counts == [2, 0]


# --- the real one


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
@pytest.mark.parametrize("is_watched", [False, True])
def test_the_real_one_writes_and_reads_through_our_descriptor(fd, tmp_path, is_watched):
    program = find_fio()
    job = FioJob(fd, False, 0, 4 * BLOCK_BYTES)
    program = with_working_engine(program, job, BLOCK_BYTES)
    both = [FioJob(fd, True, 0, 2 * BLOCK_BYTES), FioJob(fd, False, 2 * BLOCK_BYTES, 2 * BLOCK_BYTES)]
    for jobs in ([job], both):
        sample, _ = run_fio(program, jobs, block_bytes=BLOCK_BYTES, depth=2, is_watched=is_watched)
        assert sample.nbytes == 4 * BLOCK_BYTES
    assert os.pread(fd, BLOCK_BYTES, 0) != bytes(BLOCK_BYTES)
    assert os.pread(fd, 2 * BLOCK_BYTES, 2 * BLOCK_BYTES) == bytes(2 * BLOCK_BYTES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_the_real_one_fails_with_a_reason(fd):
    job = FioJob(fd, False, 64 * BLOCK_BYTES, BLOCK_BYTES)  # past the end
    with pytest.raises(FioError, match="fio failed: "):
        run_fio(find_fio(), [job], block_bytes=BLOCK_BYTES, depth=1)
