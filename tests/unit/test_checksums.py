"""`verify: checksum`: bytes that come back wrong are noticed, whatever made them wrong."""

import pytest
import torch
from fake_kvikio import DeviceTensor, FakeKvikio
from test_retries import Rig, fault, random_bytes

from ssdtrain_plugin.errors import LoadError, StateError
from ssdtrain_plugin.storage.aio import aio_problem
from ssdtrain_plugin.storage.base import Extent
from ssdtrain_plugin.storage.checksums import Checksums, Digest
from ssdtrain_plugin.storage.engines import open_drive
from ssdtrain_plugin.storage.faulty import FaultPlan
from ssdtrain_plugin.storage.memory import HostArena
from ssdtrain_plugin.storage.probe import probe_directory
from ssdtrain_plugin.storage.retries import Retries
from ssdtrain_plugin.storage.striped import StripedTier
from ssdtrain_plugin.streams import CpuStreams, DeviceEvent
from ssdtrain_plugin.units import MIB

READY = DeviceEvent()
SIZES = [1, 513, 4096, 4097, MIB + 3, 8 * MIB, 24 * MIB + 5]
SILENT = {
    "flipped bit": {"name": "FLIPPED_BIT"},
    "torn sector": {"name": "TORN_BLOCK", "block_bytes": 512},
    "torn block": {"name": "TORN_BLOCK"},
    "zero block": {"name": "TORN_BLOCK", "is_zero": True},
    "stale": {"name": "STALE"},
}


@pytest.fixture(params=[True, False], ids=["in place", "staged"])
def make_rig(request, tmp_path):
    rigs = []

    def make(*faults, **options):
        rigs.append(Rig(tmp_path, *faults, is_in_place=request.param, **{"has_checksums": True} | options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.tier.close()
        rig.arena.close()


def silent(name, operation, **options):
    return fault(**SILENT[name] | {"operation": operation} | options)


@pytest.mark.parametrize("nbytes", SIZES)
def test_right_bytes_pass(nbytes, make_rig):
    rig = make_rig()
    source = random_bytes(nbytes)
    extent = rig.store(source)
    assert torch.equal(rig.load(extent), source)
    assert torch.equal(rig.load(extent), source)
    assert rig.pauses == []
    assert ", checksums" in rig.tier.describe()


@pytest.mark.parametrize("name", list(SILENT))
@pytest.mark.parametrize("nbytes", [1, 4097, MIB + 3, 24 * MIB + 5])
def test_what_was_stored_wrong_is_noticed_at_every_load(name, nbytes, make_rig, tmp_path):
    """The old bytes are those of an extent before it, as in training from the second step on."""
    rig = make_rig(silent(name, "write", first=10))
    first = True
    while first or rig.plan.num_calls("write") < 10:
        first = False
        before = rig.store(random_bytes(nbytes, seed=1))
        rig.tier.free(before)
    extent = rig.store(random_bytes(nbytes, seed=2))
    assert extent.offset == before.offset
    with pytest.raises(LoadError, match=r"checksum [0-9a-f]{16}, expected [0-9a-f]{16}") as caught:
        rig.load(extent)
    error = caught.value
    assert (error.path, error.offset, error.nbytes) == (str(tmp_path), extent.offset, nbytes)
    assert rig.pauses == [0.0, 0.05], "read again twice"
    assert rig.tier.take_survived() == []


@pytest.mark.parametrize("seed", range(25))
def test_each_of_many_flipped_bits_is_noticed(seed, make_rig):
    rig = make_rig(silent("flipped bit", "write"), seed=seed)
    extent = rig.store(random_bytes(3 * 4096 + seed, seed))
    with pytest.raises(LoadError, match="checksum"):
        rig.load(extent)


@pytest.mark.parametrize("name", list(SILENT))
def test_what_was_read_wrong_once_is_read_again(name, make_rig):
    rig = make_rig(silent(name, "read", count=1))
    source = random_bytes(MIB + 3)
    extent = rig.store(source)
    rig.store(random_bytes(MIB + 3, 1))  # or staging memory would still hold the right bytes
    assert torch.equal(rig.load(extent), source)
    assert rig.pauses == [0.0]
    (survived,) = rig.tier.take_survived()
    assert "checksum" in survived.message


@pytest.mark.parametrize("name", ["flipped bit", "zero block", "stale"])
def test_what_is_read_wrong_for_ever_is_an_error(name, make_rig):
    rig = make_rig(silent(name, "read"))
    extent = rig.store(random_bytes(MIB + 3))
    rig.store(random_bytes(MIB + 3, 1))
    with pytest.raises(LoadError, match="checksum"):
        rig.load(extent)


def test_without_checksums_nobody_notices(make_rig):
    """What the option is for: without it wrong bytes are handed out."""
    rig = make_rig(silent("flipped bit", "write"), has_checksums=False)
    source = random_bytes(MIB)
    assert not torch.equal(rig.load(rig.store(source)), source)


def test_a_freed_extents_checksum_is_forgotten(make_rig):
    rig = make_rig()
    extent = rig.store(random_bytes(MIB, 1))
    rig.tier.free(extent)
    again = rig.tier.allocate(MIB)
    assert again.offset == extent.offset
    with pytest.raises(StateError, match="never stored"):
        rig.load(again)
    assert not rig.tier._checksums._values


@pytest.mark.parametrize("name", ["flipped bit", "stale"])
def test_each_drive_of_several_checks_its_own(name, tmp_path):
    streams = CpuStreams()
    arena = HostArena(streams)
    plan = FaultPlan([silent(name, "write", first=0, count=1)])
    drives = []
    for half in ("a", "b"):
        (tmp_path / half).mkdir()
        drives.append(
            open_drive(
                str(tmp_path / half),
                engine="posix",
                streams=streams,
                arena=arena,
                disk_bytes=64 * MIB,
                has_checksums=True,
                wrap_engine=plan.wrap,
                retries=Retries(wait=lambda seconds: None),
            )
        )
    tier = StripedTier(drives)
    try:
        sources = [random_bytes(MIB, seed) for seed in range(4)]
        extents = [tier.allocate(MIB) for _ in sources]
        assert {extent.drive for extent in extents} == {0, 1}
        for extent, source in zip(extents, sources, strict=True):
            tier.write(extent, source, READY)
        with pytest.raises(LoadError, match="checksum"):
            tier.read(extents[0], torch.empty(MIB, dtype=torch.uint8), READY)
        for extent, source in zip(extents[1:], sources[1:], strict=True):
            target = torch.empty(MIB, dtype=torch.uint8)
            tier.read(extent, target, READY)
            assert torch.equal(target, source)
    finally:
        tier.close()


@pytest.mark.parametrize("engine", ["aio", "gds"])
@pytest.mark.parametrize("nbytes", [513, MIB + 3, 9 * MIB + 5])
def test_the_other_engines_are_checked_too(engine, nbytes, tmp_path, monkeypatch):
    if not probe_directory(str(tmp_path)).supports_direct:
        pytest.skip("no O_DIRECT in the temporary directory")
    if engine == "gds":
        FakeKvikio().install(monkeypatch)
    elif problem := aio_problem():
        pytest.skip(problem)
    on_device = DeviceTensor.of if engine == "gds" else lambda tensor: tensor
    streams = CpuStreams()
    arena = HostArena(streams)
    plan = FaultPlan([silent("flipped bit", "read", first=8)])
    tier = open_drive(
        str(tmp_path),
        engine=engine,
        streams=streams,
        arena=arena,
        disk_bytes=64 * MIB,
        has_checksums=True,
        wrap_engine=plan.wrap,
        retries=Retries(wait=lambda seconds: None),
    )
    try:
        extent, source = tier.allocate(nbytes), random_bytes(nbytes)
        tier.write(extent, on_device(arena.tensor(nbytes).copy_(source)), READY)
        target = arena.tensor(nbytes).zero_()
        tier.read(extent, on_device(target), READY).synchronize()
        assert torch.equal(target, source)
        while plan.num_calls("read") < 8:
            tier.read(extent, on_device(target), READY).synchronize()
        with pytest.raises(LoadError, match="checksum"):
            tier.read(extent, on_device(target), READY)
    finally:
        tier.close()
        arena.close()


def test_a_digest_is_of_the_bytes_and_not_of_their_parts():
    memory = random_bytes(20 * MIB + 7)
    whole, parts, other = Digest(), Digest(), Digest()
    whole.update(memory)
    for part in memory.split(3 * MIB + 1):
        parts.update(part)
    other.update(memory[1:])
    assert whole.value == parts.value != other.value


def test_extents_do_not_mix_their_checksums():
    sums = Checksums()
    first, second = Extent(0, 5, 4096), Extent(4096, 5, 4096)
    sums.remember(first, 1)
    sums.remember(second, 2)
    sums.forget(first)
    assert sums.expected(second) == 2
    with pytest.raises(StateError):
        sums.expected(first)
    sums.forget(first)
