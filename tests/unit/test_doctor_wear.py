"""What the doctor says about bytes written and the life of drives."""

import ctypes
import os

import pytest

from ssdtrain_plugin.doctor import wear
from ssdtrain_plugin.doctor.drives import BlockDevice
from ssdtrain_plugin.doctor.wear import Health, parse_health, wear_findings
from ssdtrain_plugin.storage.drive_identity import identity_of
from ssdtrain_plugin.storage.wear import WearFile

TB = 10**12


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "ssdtrain"


def health_log(used_percent, units):
    log = bytearray(512)
    log[5] = used_percent
    log[48:64] = units.to_bytes(16, "little")
    return bytes(log)


def test_a_drive_nobody_has_written_to(tmp_path):
    (finding,) = wear_findings(str(tmp_path), None, 600 * TB)
    assert (finding.name, finding.fact) == ("written by us", "nothing so far")


def test_what_was_recorded_and_what_is_left(tmp_path, state):
    WearFile(state).add(identity_of(str(tmp_path)), str(tmp_path), {"2026-11-19": 3 * TB, "2026-11-20": 3 * TB})
    (finding,) = wear_findings(str(tmp_path), None, None)
    assert finding.fact == "5.5 TiB since 2026-11-19, 2.7 TiB a day of use"
    (finding,) = wear_findings(str(tmp_path), None, 600 * TB)
    assert finding.fact.endswith(
        "1.0% of the rated 545.7 TiB since 2026-11-19; the rest lasts 198 days of use like the last 2"
    )


def test_a_damaged_record_is_said(tmp_path, state):
    state.mkdir(parents=True)
    (state / "wear.json").write_text("{", encoding="ascii")
    (finding,) = wear_findings(str(tmp_path), None, None)
    assert finding.fact.startswith("unknown: ")


def test_the_log_of_a_drive_is_read_as_the_standard_says():
    assert parse_health(health_log(7, 1_953_125)) == Health(7, TB)
    with pytest.raises(ValueError, match="3 bytes"):
        parse_health(bytes(3))
    assert ctypes.sizeof(wear._AdminCommand) == 72, "as in the number of the ioctl"


@pytest.mark.parametrize(("used_percent", "has_advice"), [(7, False), (100, True)])
def test_a_drive_that_answers(tmp_path, monkeypatch, used_percent, has_advice):
    def answer(fd, request, command):
        assert (command.opcode, command.cdw10, command.data_bytes) == (2, 0x007F0002, 512)
        ctypes.memmove(command.address, health_log(used_percent, 1_953_125), 512)
        return 0

    monkeypatch.setattr(wear.fcntl, "ioctl", answer)
    (tmp_path / "nvme3").write_bytes(b"")
    drive = BlockDevice("nvme3n1", tmp_path, "", ())
    finding = wear_findings(str(tmp_path), drive, None, dev_root=tmp_path)[1]
    assert finding.fact == f"nvme3n1: {used_percent} % of its life used, 931.3 GiB written by all in its life"
    assert (finding.advice is not None) is has_advice


@pytest.mark.parametrize(("name", "reason"), [("sda", "no NVMe drive"), ("nvme0n1", os.strerror(2))])
def test_a_drive_that_cannot_be_asked(tmp_path, name, reason):
    finding = wear_findings(str(tmp_path), BlockDevice(name, tmp_path, "", ()), None, dev_root=tmp_path)[1]
    assert reason in finding.fact
