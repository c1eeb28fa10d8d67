"""Calls that fail are made again: at once when interrupted, after pauses when that may help, and not for ever."""

import errno

import pytest
import torch

from ssdtrain_plugin.errors import LoadError, StoreError
from ssdtrain_plugin.storage.engines import open_drive
from ssdtrain_plugin.storage.faulty import Fault, FaultKind, FaultPlan
from ssdtrain_plugin.storage.memory import HostArena
from ssdtrain_plugin.storage.retries import Attempts, Retries, ShortTransferError
from ssdtrain_plugin.streams import CpuStreams, DeviceEvent
from ssdtrain_plugin.units import MIB

READY = DeviceEvent()
LOAD_PAUSES, STORE_PAUSES = [0.01, 0.05, 0.25], [0.01, 0.05]


class Rig:
    """A drive with faults, and the pauses that it made."""

    def __init__(self, directory, *faults, seed=0, is_in_place=True, has_checksums=False):
        streams = CpuStreams()
        self.pauses = []
        self.plan = FaultPlan(faults, seed=seed)
        self.arena = HostArena(streams)
        self.is_in_place = is_in_place
        self.tier = open_drive(
            str(directory),
            engine="posix",
            streams=streams,
            arena=self.arena,
            disk_bytes=512 * MIB,
            has_checksums=has_checksums,
            wrap_engine=self.plan.wrap,
            retries=Retries(wait=self.pauses.append),
        )

    def memory(self, nbytes):
        """Aligned to the drive's wish, or just not."""
        return self.arena.tensor(nbytes) if self.is_in_place else self.arena.tensor(nbytes + 1)[1:]

    def store(self, source):
        extent = self.tier.allocate(source.numel())
        self.tier.write(extent, self.memory(source.numel()).copy_(source), READY)
        return extent

    def load(self, extent):
        target = self.memory(extent.nbytes).zero_()
        self.tier.read(extent, target, READY).synchronize()
        return target


@pytest.fixture(params=[True, False], ids=["in place", "staged"])
def make_rig(request, tmp_path):
    rigs = []

    def make(*faults, **options):
        rigs.append(Rig(tmp_path, *faults, is_in_place=request.param, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.tier.close()
        rig.arena.close()


def random_bytes(nbytes, seed=0):
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def fault(name, operation, **options):
    return Fault(FaultKind[name], operation, **options)


# --- loads


@pytest.mark.parametrize("name", ["SHORT", "EIO", "EACCES", "ENOSPC"])
def test_a_load_that_fails_three_times_goes_well_the_fourth(name, make_rig):
    rig = make_rig(fault(name, "read", count=3))
    source = random_bytes(MIB + 5)
    assert torch.equal(rig.load(rig.store(source)), source)
    assert rig.pauses == LOAD_PAUSES
    (survived,) = rig.tier.take_survived()
    assert isinstance(survived, LoadError)
    assert rig.tier.take_survived() == []


@pytest.mark.parametrize("name", ["SHORT", "EIO", "EACCES"])
def test_a_load_that_goes_on_failing_raises_with_its_numbers(name, make_rig, tmp_path):
    rig = make_rig(fault(name, "read"))
    extent = rig.store(random_bytes(MIB))
    with pytest.raises(LoadError, match="cannot load activation") as caught:
        rig.load(extent)
    error = caught.value
    assert error.errno == getattr(errno, name, None)
    assert (error.path, error.offset, error.nbytes) == (str(tmp_path), extent.offset, MIB)
    assert rig.pauses == LOAD_PAUSES
    assert rig.plan.num_calls("read") == 4
    assert rig.tier.take_survived() == []


def test_the_pauses_of_one_call_are_short():
    for pauses in (Retries().load_pauses_seconds, Retries().store_pauses_seconds, Retries().checksum_pauses_seconds):
        assert sum(pauses) < 1.0


# --- stores


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EACCES"])
def test_a_store_that_fails_for_good_is_not_tried_again(name, make_rig):
    rig = make_rig(fault(name, "write"))
    with pytest.raises(StoreError) as caught:
        rig.store(random_bytes(MIB))
    assert caught.value.errno == getattr(errno, name)
    assert rig.pauses == []
    assert rig.plan.num_calls("write") == 1


def test_a_short_store_is_tried_again(make_rig):
    rig = make_rig(fault("SHORT", "write", count=2))
    source = random_bytes(MIB + 5)
    assert torch.equal(rig.load(rig.store(source)), source)
    assert rig.pauses == STORE_PAUSES
    (survived,) = rig.tier.take_survived()
    assert isinstance(survived, StoreError)


def test_a_store_that_stays_short_fails(make_rig):
    rig = make_rig(fault("SHORT", "write"))
    with pytest.raises(StoreError, match=r"wrote \d+ bytes, expected \d+"):
        rig.store(random_bytes(MIB))
    assert rig.pauses == STORE_PAUSES


# --- both


@pytest.mark.parametrize("operation", ["write", "read"])
@pytest.mark.parametrize("name", ["EINTR", "EAGAIN"])
def test_an_interrupted_call_is_made_again_at_once_and_is_nobodys_news(name, operation, make_rig):
    rig = make_rig(fault(name, operation, count=4))
    source = random_bytes(MIB)
    assert torch.equal(rig.load(rig.store(source)), source)
    assert rig.pauses == []
    assert rig.tier.take_survived() == []


@pytest.mark.parametrize(
    ("operation", "kind", "pauses"), [("write", StoreError, STORE_PAUSES), ("read", LoadError, LOAD_PAUSES)]
)
def test_a_call_interrupted_for_ever_fails_in_the_end(operation, kind, pauses, make_rig):
    rig = make_rig(fault("EAGAIN", operation))
    with pytest.raises(kind) as caught:
        rig.load(rig.store(random_bytes(MIB)))
    assert caught.value.errno == errno.EAGAIN
    assert rig.pauses == pauses


def test_each_call_of_a_long_transfer_has_its_own_attempts(make_rig):
    """30 MiB are staged in four calls, and are one call in place."""
    rig = make_rig(*(fault("EIO", "read", first=4 * call, count=3) for call in range(4)))
    source = random_bytes(30 * MIB)
    assert torch.equal(rig.load(rig.store(source)), source)
    assert rig.pauses == LOAD_PAUSES * (1 if rig.is_in_place else 4)


def test_a_store_that_is_interrupted_and_then_fails_for_good_stops():
    attempts = Attempts(Retries(wait=pytest.fail), is_store=True)
    assert attempts.again(InterruptedError(errno.EINTR, "interrupted"))
    assert not attempts.again(OSError(errno.EIO, "broken"))
    assert not attempts.has_paused


def test_interruptions_do_not_use_up_the_patience_of_a_load():
    pauses = []
    attempts = Attempts(Retries(wait=pauses.append), is_store=False)
    for error in [OSError(errno.EINTR, "")] * 4 + [ShortTransferError("half")] * 3:
        assert attempts.again(error)
    assert not attempts.again(ShortTransferError("half"))
    assert pauses == LOAD_PAUSES
