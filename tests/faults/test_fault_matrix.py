"""A part of the table of faults, in real processes; ``make test-faults`` runs all of it."""

import os
import subprocess

import pytest
from fault_cases import ALL_CASES, BAD, END_STEP, NUM_STEPS, PIPELINE, PLAIN, FaultCase, Outcome, Place
from fault_jobs import Ended, Job, Row, judge, loop_devices, mount_problem, run_cases, wait_for_loop_devices
from fault_table import BEGIN, END, MANUAL, insert_table, render_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

# One of each outcome and of each way to fail; the errors that differ only in their number are left to the whole table.
SURVIVED = (
    "ENOSPC, store, every call",
    "hung call, store, every call",
    "short, store, every 7th call",
    "EIO, load, every 7th call",
    "stale extent, load, every 7th call",
    "delay of 20 ms, load, every 7th call",
    "directory deleted, both, `rmdir` while training",
    "RLIMIT_FSIZE, store, 64 KiB from step 1 on",
    "file system full, store, a small ext4 fills",
)
IN_A_GROUP = (
    "cgroup memory limit, store, the limit falls before step 0; little disk",
    "cgroup memory limit, both, below `host_bytes` at the start",
)
ENDED = (
    "drive loses its bytes, load, the file behind a loop device is truncated",
    "RLIMIT_NOFILE, both, no more files before the start",
)
ENDED_IN_A_PIPELINE = ("EIO, load, every call, rank 0",)


def cases_of(names):
    by_name = {case.name: case for case in ALL_CASES}
    return [by_name[name] for name in names]


def rows_of(names, host, directory):
    rows = list(run_cases(cases_of(names), host, directory))
    assert {row.case.name for row in rows} == set(names)
    return {row.case.name: row for row in rows}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return rows_of(SURVIVED + IN_A_GROUP + ENDED, PLAIN, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", SURVIVED + IN_A_GROUP + ENDED)
def test_an_attached_model_under_a_fault(plain, name):
    row = plain[name]
    if row.outcome is None:
        pytest.skip(row.remark)
    assert row.outcome is row.case.expected, row.remark
    assert row.are_equal is (None if row.case.expected is Outcome.REFUSED else True)
    assert row.leftovers == []
    assert row.seconds is not None


@pytest.mark.deepspeed
def test_a_pipeline_under_faults_that_it_survives(tmp_path):
    pytest.importorskip("deepspeed")
    for row in rows_of(SURVIVED[:-1], PIPELINE, tmp_path).values():
        assert row.is_good, (row.case.name, row)


@pytest.mark.deepspeed
@pytest.mark.parametrize("name", ENDED_IN_A_PIPELINE)
def test_a_load_that_stays_failed_ends_all_ranks(name, tmp_path):
    pytest.importorskip("deepspeed")
    (row,) = rows_of([name], PIPELINE, tmp_path).values()
    assert row.is_good, row
    assert "LoadError" in row.outcome.value
    assert "the launcher ends all with exit code 1" in row.remark


# ---------------------------------------------------------------------- the table itself


def row(outcome, case=ALL_CASES[0], **changes):
    return Row(case, PLAIN, outcome, **{"are_equal": True, "seconds": 1.0} | changes)


def test_every_fault_has_a_row_for_each_direction_and_host():
    wanted = {"short", "EIO", "ENOSPC", "EINTR", "EAGAIN", "EACCES", "flipped bit", "torn block", "stale extent"}
    wanted |= {"hung call", "delay of 20 ms"}
    for host in (PLAIN, PIPELINE):
        found = {(case.fault, case.direction) for case in ALL_CASES if host in case.hosts}
        assert {(fault, way) for fault in wanted for way in ("store", "load")} <= found
    assert len({case.name for case in ALL_CASES}) == len(ALL_CASES)
    assert not any(case.expected in BAD for case in ALL_CASES)


@pytest.mark.parametrize("outcome", sorted(BAD, key=lambda outcome: outcome.value))
def test_a_bad_outcome_is_never_good(outcome):
    assert not row(outcome).is_good


def test_a_row_is_good_only_if_all_of_it_is():
    expected = ALL_CASES[0].expected
    assert row(expected).is_good
    assert row(None, remark="not run: needs root").is_good
    assert not row(expected, are_equal=False).is_good
    assert not row(expected, are_equal=None).is_good, "no step has shown a number"
    assert not row(expected, leftovers=["thread"]).is_good
    assert not row(Outcome.RETRIED).is_good


def test_the_table_goes_between_its_markers():
    table = render_table([row(ALL_CASES[0].expected), row(None, remark="not run: needs root")])
    assert table.count("\n") == 4
    assert insert_table(f"before {BEGIN}old{END} after", table) == f"before {BEGIN}\n{table}{END} after"
    with pytest.raises(ValueError, match="has no"):
        insert_table("nothing", table)


def test_the_manual_has_a_row_for_every_case():
    table = MANUAL.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = table.strip().splitlines()[2:]
    assert len(lines) == sum(len(case.hosts) for case in ALL_CASES)
    for case in ALL_CASES:
        for host in case.hosts:
            start = f"| {case.fault} | {case.direction} | {case.calls} | {host} | "
            assert any(line.startswith(start) for line in lines), start
    for word in ("hang |", "abort |", "silent |", "| NO |"):
        assert word not in table


# ---------------------------------------------------------------------- the judge

KEPT, RETRIED, STOPPED = (
    next(case for case in ALL_CASES if case.expected is outcome and case.kind == "EIO")
    for outcome in (Outcome.KEPT, Outcome.RETRIED, Outcome.STOPPED)
)
_SAYS = {Outcome.KEPT: "the tensor stays in memory", Outcome.RETRIED: "another attempt has moved the bytes"}
_LOST = 'Traceback\n  File "worker.py", line 3, in run\nssdtrain_plugin.errors.LoadError: cannot load it\n\nhint: look'


def survived(case, *, code=0, text="", wrong_step=None, **changes):
    """A job that went through, with one thing that did not go well."""
    end = {"event": "end", "at": 9.0, "num_injected": 3, "failures": {"ssd: EIO": 3}, "moved": [[8, 8]] * NUM_STEPS}
    end |= {"messages": [_SAYS[case.expected]], "leftovers": []} | changes
    events = [{"event": "begin", "at": 0.0}]
    for number in range(NUM_STEPS):
        events += [{"event": "fault", "at": 1.5}] if number == 1 else []
        events.append({"event": "step", "at": 1.0 + number, "number": number, "is_equal": number != wrong_step})
    events += [end] if code == 0 else []
    return Ended(code, 10.0, text, {}, [{"rank": 0, "case": case.name} | event for event in events], [])


def ended(*, code=1, text=_LOST, at=3.0, are_equal=True, has_fault=True):
    """A job that a failed load has ended."""
    events = [{"event": "step", "at": 0.5, "is_equal": are_equal}, *([{"event": "fault", "at": 1.0}] * has_fault)]
    return Ended(code, at, text, {}, [{"rank": 0, "case": STOPPED.name} | event for event in events], [])


def test_what_goes_well_is_judged_so():
    for case in (KEPT, RETRIED):
        found = judge(case, PLAIN, survived(case))
        assert found.is_good
        assert found.seconds == 0.5
    assert judge(STOPPED, PLAIN, ended()).is_good
    assert judge(STOPPED, PLAIN, ended()).seconds == 2.0


@pytest.mark.parametrize("case", [KEPT, RETRIED], ids=["kept", "retried"])
@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"wrong_step": 4}, Outcome.SILENT),
        ({"messages": []}, Outcome.SILENT),
        ({"failures": {}}, Outcome.SILENT),
        ({"num_injected": 0}, Outcome.UNREACHED),
        ({"code": None}, Outcome.HANG),
        ({"code": -6}, Outcome.ABORT),
        ({"code": 1, "text": "terminate called"}, Outcome.ABORT),
        ({"code": 1}, Outcome.OTHER),
    ],
)
def test_what_a_job_should_survive_and_does_not_is_named(case, changes, outcome):
    assert judge(case, PLAIN, survived(case, **changes)).outcome is outcome


def test_a_drive_that_is_never_used_again_is_not_good():
    moved = [[8, 8]] * END_STEP + [[0, 0], [8, 0]] * (NUM_STEPS - END_STEP)
    assert judge(KEPT, PLAIN, survived(KEPT, moved=moved)).outcome is Outcome.OTHER
    assert judge(RETRIED, PLAIN, survived(RETRIED, moved=moved)).outcome is Outcome.SILENT


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"code": None}, Outcome.HANG),
        ({"at": 60.0}, Outcome.HANG),
        ({"code": -11}, Outcome.ABORT),
        ({"code": 134}, Outcome.ABORT),
        ({"code": 0}, Outcome.SILENT),
        ({"text": "Traceback\nValueError: 3"}, Outcome.OTHER),
        ({"text": _LOST.replace("hint: ", "")}, Outcome.OTHER),
        ({"has_fault": False}, Outcome.UNREACHED),
    ],
)
def test_a_job_that_ends_in_another_way_than_by_its_error_is_named(changes, outcome):
    assert judge(STOPPED, PLAIN, ended(**changes)).outcome is outcome


def test_a_wrong_number_before_the_end_is_not_good():
    assert not judge(STOPPED, PLAIN, ended(are_equal=False)).is_good


def test_without_a_step_there_are_no_numbers_to_compare():
    refused = next(case for case in ALL_CASES if case.expected is Outcome.REFUSED)
    text = _LOST.replace("LoadError", "ConfigError")
    job = Ended(1, 3.0, text, {}, [{"rank": 0, "case": refused.name, "event": "fault", "at": 1.0}], [])
    found = judge(refused, PLAIN, job)
    assert found.is_good
    assert "| - | none | 2.0 |" in render_table([found])
    job.text = _LOST
    found = judge(STOPPED, PLAIN, job)
    assert found.outcome is Outcome.STOPPED
    assert not found.is_good, "it had steps to take"


@pytest.mark.parametrize("words", ["Fatal Python error: Aborted", "terminate called after throwing"])
def test_an_abort_of_any_rank_is_seen(words):
    """A launcher prints nothing of it, and ends with a code of its own."""
    peer = {0: _LOST, 1: words}
    job = ended(text="the launcher")
    job.rank_texts = peer
    assert judge(STOPPED, PIPELINE, job).outcome is Outcome.ABORT
    for case in (KEPT, RETRIED):
        job = survived(case, code=1)
        job.rank_texts = peer
        assert judge(case, PIPELINE, job).outcome is Outcome.ABORT


# ---------------------------------------------------------------------- mounts


def test_a_mount_of_a_job_that_is_killed_goes_with_it(tmp_path):
    """Not even SIGKILL leaves a mount or a loop device."""
    problem = mount_problem(tmp_path)
    if problem is not None:
        pytest.skip(problem)
    job = Job(tmp_path, PLAIN, Place.SMALL, ())
    job.mount.mkdir()
    command = job.mounted(["/bin/sh", "-c", "echo up; exec cat"])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        assert loop_devices(tmp_path), "the job has its device"
        assert not os.path.ismount(job.mount), "and nobody else sees its mount"
        process.kill()
    assert wait_for_loop_devices(tmp_path) == []


def test_the_names_of_cases_are_what_requests_hold():
    case = FaultCase("EIO", "load", "every call", Outcome.STOPPED, "EIO", ranks=(1,))
    assert case.name == "EIO, load, every call, rank 1"
