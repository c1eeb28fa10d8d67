"""Bytes by drive and day, over runs; the limit of a day; the life of a drive."""

import fcntl
import json
import os
import stat
import subprocess
import sys
import threading

import pytest
import torch
from clocks import ManualClock
from torch import nn

import ssdtrain_plugin as ssdtrain
from ssdtrain_plugin.doctor.wear import wear_findings
from ssdtrain_plugin.runtime import Parts, attach_with
from ssdtrain_plugin.storage import wear
from ssdtrain_plugin.storage.drive_identity import identity_of
from ssdtrain_plugin.storage.wear import DriveMeter, DriveRecord, WearFile, day_of, life_line, state_folder

DAY = 86_400
MIB = 1 << 20
TB = 10**12
NOON = 20_000 * DAY + DAY // 2  # 2024-10-04


def meter(folder, clock, **options):
    return DriveMeter("serial:1", "/mnt/a", folder=folder, clock=clock, **options)


def test_a_day_is_one_of_utc():
    assert [day_of(0), day_of(NOON), day_of(NOON + DAY / 2)] == ["1970-01-01", "2024-10-04", "2024-10-05"]


def test_the_state_directory_is_that_of_the_specification(tmp_path, monkeypatch):
    assert state_folder({"XDG_STATE_HOME": "/var/state"}) == wear.Path("/var/state/ssdtrain")
    monkeypatch.setenv("HOME", str(tmp_path))
    default = tmp_path / ".local" / "state" / "ssdtrain"
    assert state_folder({}) == state_folder({"XDG_STATE_HOME": "relative"}) == default
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert state_folder({}) is None


def test_runs_add_up_by_day(tmp_path):
    clock = ManualClock(NOON)
    for _ in range(3):
        one = meter(tmp_path, clock)
        one.add(10)
        one.flush()
        clock.advance(DAY / 2)
    record = WearFile(tmp_path).read()["serial:1"]
    assert record == DriveRecord("/mnt/a", "2024-10-04", 30, {"2024-10-04": 10, "2024-10-05": 20})


def test_the_file_is_its_owners_alone_and_replaced_whole(tmp_path):
    folder = tmp_path / "state" / "ssdtrain"
    before = os.umask(0)
    try:
        one = meter(folder, ManualClock(NOON))
        one.add(1)
        one.flush()
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(path.name for path in folder.iterdir()) == ["wear.json", "wear.lock"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_processes_do_not_lose_each_others_bytes(tmp_path):
    code = (
        "import sys, pathlib; from ssdtrain_plugin.storage.wear import WearFile\n"
        "for _ in range(50): WearFile(pathlib.Path(sys.argv[1])).add('serial:1', '/mnt/a', {'2026-11-20': 1})"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    children = [subprocess.Popen(command) for _ in range(2)]
    assert [child.wait(120) for child in children] == [0, 0]
    assert WearFile(tmp_path).read()["serial:1"].total_bytes == 100


def test_old_days_are_dropped_and_stay_in_the_total():
    record = DriveRecord("/mnt/a", day_of(0))
    for day in range(500):
        record.add(1, day_of(day * DAY))
    assert (record.total_bytes, len(record.days), min(record.days)) == (500, 400, day_of(100 * DAY))


# --- a file that is damaged, held or out of reach is a warning


def file_of(**changes):
    """What a file with one record holds, changed."""
    record = {"path": "/", "since": "2024-10-01", "total_bytes": 1, "days": {"2024-10-01": 1}} | changes
    return json.dumps({"version": 1, "drives": {"a": record}})


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"version": 2, "drives": {}}', '{"version": 1}'),
        '{"version": 1, "drives": {"a": {}}}',
        *(file_of(total_bytes=number) for number in (-1, 1.0, 10**400)),
        *(file_of(since=day) for day in ("", "2024-02-30", "20241001", "2024-10-01\n", "\x1b[2J")),
        *(file_of(days={day: 1}) for day in ("", "yesterday", "2024-W40-2")),
        file_of(days={day_of(day * DAY): 1 for day in range(401)}),
        *("[" * 200_000, '{"version": [' + "1," * MIB + "1]}", " " * (16 * MIB + 1)),
    ],
    ids=lambda text: text[:60],
)
def test_a_damaged_file_is_put_aside_and_said(tmp_path, caplog, text):
    (tmp_path / "wear.json").write_text(text, encoding="utf-8")
    one = meter(tmp_path, ManualClock(NOON))
    one.add(7)
    one.flush()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "is damaged" in caplog.text
    assert len(caplog.text) < 1000
    assert (tmp_path / "wear.json.damaged").read_text(encoding="utf-8") == text
    assert WearFile(tmp_path).read()["serial:1"].total_bytes == 7


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("elsewhere"), os.mkdir], ids=["pipe", "link", "folder"]
)
def test_what_is_no_file_is_put_aside_and_not_waited_for(tmp_path, caplog, make):
    make(tmp_path / "wear.json")
    one = meter(tmp_path, ManualClock(NOON))
    one.add(7)
    one.flush()
    assert "is damaged" in caplog.text
    assert os.path.lexists(tmp_path / "wear.json.damaged")
    assert WearFile(tmp_path).read()["serial:1"].total_bytes == 7


def test_the_record_of_a_large_site_is_not_too_large(tmp_path):
    file, days = WearFile(tmp_path), {day_of(NOON + day * DAY): 10**13 for day in range(400)}
    records = {
        f"serial:{drive:020}": DriveRecord("/mnt/nvme/ssdtrain", min(days), 10**16, days) for drive in range(400)
    }
    file._replace(records)
    assert file.read() == records


def test_training_and_the_doctor_go_on_with_a_damaged_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "ssdtrain").mkdir()
    (tmp_path / "ssdtrain" / "wear.json").write_text("[" * 200_000, encoding="ascii")
    (tmp_path / "drive").mkdir()
    with ssdtrain.attach(Chain(), {"paths": str(tmp_path / "drive"), "policy": "all"}):
        pass
    (finding,) = wear_findings(str(tmp_path / "drive"), None, TB)
    assert "nested too deeply" in finding.fact


def test_a_file_that_cannot_be_written_is_said_once_and_counted_here(tmp_path, caplog):
    blocked = tmp_path / "a file"
    blocked.write_text("", encoding="ascii")
    one = meter(blocked / "state", ManualClock(NOON), limit_bytes=10)
    for _ in range(3):
        one.add(2)
        one.flush()
    assert len(caplog.records) == 1
    assert "is not recorded over runs" in caplog.text
    assert "6 B of 10 B written today" in one.line()
    blocked.unlink()
    one.flush()
    assert WearFile(blocked / "state").read()["serial:1"].total_bytes == 6, "added as soon as it can be"


def test_without_a_home_it_is_said_once(caplog):
    one = meter(None, ManualClock(NOON))
    for _ in range(2):
        one.add(2)
        one.flush()
    assert len(caplog.records) == 1


def test_a_lock_that_is_held_is_not_waited_for_long(tmp_path):
    waits = []
    file = WearFile(tmp_path, wait=waits.append)
    with (tmp_path / "wear.lock").open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            file.add("serial:1", "/mnt/a", {"2026-11-20": 1})
    assert sum(waits) < 2
    file.add("serial:1", "/mnt/a", {"2026-11-20": 1})


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "wear.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        WearFile(tmp_path).add("serial:1", "/mnt/a", {"2026-11-20": 1})
    assert not (tmp_path / "elsewhere").exists()


# --- the limit


def test_the_limit_counts_other_runs_and_ends_with_the_day(tmp_path, caplog):
    clock = ManualClock(NOON)
    other = meter(tmp_path, clock)
    other.add(60)
    other.flush()
    one = meter(tmp_path, clock, limit_bytes=100)
    one.add(39)
    assert not one.is_at_limit
    one.add(1)
    one.add(1)
    assert one.is_at_limit
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    one.flush()
    assert one.is_at_limit
    clock.advance(DAY / 2)
    assert not one.is_at_limit
    one.add(99)
    assert not one.is_at_limit
    one.add(1)
    assert one.is_at_limit
    assert len(caplog.records) == 2, "once a day"


class Chain(nn.Module):
    def forward(self, x):
        for _ in range(4):
            x = x.exp().tanh()
        return x.sum()


@pytest.mark.parametrize("num_paths", [1, 2])
def test_training_keeps_when_the_limit_is_reached_and_goes_on_the_next_day(tmp_path, monkeypatch, caplog, num_paths):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    clock, model = ManualClock(NOON), Chain()
    paths = [tmp_path / f"drive{index}" for index in range(num_paths)]
    for path in paths:
        path.mkdir()
    x = torch.linspace(0, 1, MIB // 4, requires_grad=True)
    Chain()(x).backward()
    expected, x.grad = x.grad, None
    config = ssdtrain.OffloadConfig(
        paths=tuple(map(str, paths)), policy="all", min_tensor_bytes=1, daily_write_limit=4 * MIB
    )
    stored = []
    with attach_with(model, config, Parts(wall_clock=clock)) as offloader:
        for step in range(4):
            if step == 3:
                clock.advance(DAY)
            loss = model(x)
            offloader.cache._queue.wait_idle()
            loss.backward()
            assert torch.equal(x.grad, expected)
            x.grad = None
            stats = offloader.end_step()
            stored.append(stats.stored_bytes)
            if step == 2:
                assert stats.failures == {"ssd: daily_write_limit": 1}, (
                    "said, once a step; the policy does not see the drive"
                )
        report = offloader.report()
    assert stored[0] > 0
    assert stored[2] == 0, "the limit is reached"
    assert stored[3] > 0, "the next day"
    reached = [record for record in caplog.records if "`daily_write_limit` of 4.0 MiB is reached" in record.message]
    assert 1 <= len({record.message for record in reached}) <= num_paths
    assert "of 4.0 MiB written today" in report
    (record,) = WearFile(tmp_path / "state" / "ssdtrain").read().values()
    assert record.total_bytes == sum(stored)
    assert len(record.days) == 2


# --- life


def test_the_life_of_a_drive_is_projected_from_days_of_use():
    record = DriveRecord("/mnt/a", "2026-11-01", 30 * TB, {f"2026-11-{day:02}": 3 * TB for day in range(1, 11)})
    assert life_line(record, 600 * TB) == (
        "5.0% of the rated 545.7 TiB since 2026-11-01; the rest lasts 190 days of use like the last 10"
    )
    assert "lasts 5 years" in life_line(DriveRecord("/", "", TB, {"a": TB}), 2000 * TB)
    assert "lasts 0 days" in life_line(DriveRecord("/", "", 2 * TB, {"a": TB}), TB)
    assert life_line(DriveRecord("/", "2026-11-01"), TB).endswith("since 2026-11-01")


# --- which drive


def fake_sys(tmp_path, path, files):
    device = os.stat(path).st_dev
    folder = tmp_path / "sys" / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="ascii")
    return tmp_path / "sys"


def test_the_serial_number_comes_first(tmp_path):
    sys_root = fake_sys(tmp_path, tmp_path, {"device/serial": "  S5 1 \n"})
    assert identity_of(str(tmp_path), sys_root=sys_root, dev_root=tmp_path) == "serial:S5 1"


def test_else_the_device_number(tmp_path):
    device = os.stat(tmp_path).st_dev
    expected = f"device:{os.major(device)}:{os.minor(device)}"
    assert identity_of(str(tmp_path), sys_root=tmp_path, dev_root=tmp_path) == expected


def test_directories_of_one_file_system_are_on_one_drive(tmp_path):
    (tmp_path / "a").mkdir()
    assert identity_of(str(tmp_path)) == identity_of(str(tmp_path / "a"))


def test_threads_do_not_lose_bytes(tmp_path):
    one = meter(tmp_path, ManualClock(NOON))

    def work():
        for _ in range(200):
            one.add(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        one.flush()
    for thread in threads:
        thread.join(60)
    one.flush()
    assert WearFile(tmp_path).read()["serial:1"].total_bytes == 800
