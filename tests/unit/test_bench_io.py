"""`ssdtrain bench io`: both sides do the same, every byte is compared, nothing stays. No timing is asserted."""

import dataclasses
import json
import os
import shutil

import pytest
from fake_fio import install
from typer.testing import CliRunner

from ssdtrain_plugin.bench import io
from ssdtrain_plugin.bench.fio import Sample
from ssdtrain_plugin.bench.io import IoOptions, measure_io
from ssdtrain_plugin.bench.io_sides import Buffers, Fio, Ours
from ssdtrain_plugin.cli import app
from ssdtrain_plugin.errors import CapacityError, LoadError, StoreError
from ssdtrain_plugin.storage.checksums import Digest
from ssdtrain_plugin.storage.memory import HostArena
from ssdtrain_plugin.streams import CpuStreams
from ssdtrain_plugin.units import GIB, KIB

BLOCK_BYTES = 64 * KIB
SMALL = ("--size", "256 KiB", "--block", "64 KiB", "--threads", "2", "--rounds", "2")
TINY = (*SMALL, "--verify", "off")
DIRECTIONS = ["write", "read", "mixed"]


def tiny(**changes):
    options = IoOptions(4 * BLOCK_BYTES, BLOCK_BYTES, threads=2, rounds=2, verify=("off",))
    return dataclasses.replace(options, **changes)


def run(*arguments):
    result = CliRunner().invoke(app, ["bench", "io", *map(str, arguments)])
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def fake_fio(tmp_path_factory, monkeypatch):
    return install(tmp_path_factory.mktemp("fake-fio"), monkeypatch)


@pytest.fixture
def no_fio(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.fixture
def two_paths(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    return [str(path) for path in paths]


# --- the command


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_ours_beside_the_real_fio(tmp_path):
    result = run(tmp_path, *TINY, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    (place,) = report["places"]
    assert [row["method"] for row in place["rows"]] == ["posix", "fio"]
    assert report["fio"].startswith("fio-")
    for row in place["rows"]:
        assert list(row["figures"]) == DIRECTIONS
        for figure in row["figures"].values():
            assert figure["bytes_per_second"] > 0
            assert len(figure["bytes_per_second_by_round"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_json_has_these_fields(fake_fio, two_paths):
    report = json.loads(run(*two_paths, *TINY, "--json").stdout)
    assert list(report) == ["size_bytes", "block_bytes", "threads", "rounds", "fio", "remarks", "places"]
    assert (report["size_bytes"], report["block_bytes"], report["threads"], report["rounds"]) == (
        256 << 10,
        64 << 10,
        2,
        2,
    )
    assert [place["paths"] for place in report["places"]] == [two_paths[:1], two_paths[1:], two_paths]
    for place in report["places"]:
        assert list(place) == ["paths", "throttles", "rows"]
        assert [row["method"] for row in place["rows"]] == ["posix", "fio"]
        for row in place["rows"]:
            assert list(row) == ["method", "verify", "how", "first_write_bytes_per_second", "figures"]
            assert list(row["figures"]) == DIRECTIONS
            is_alone, is_ours = len(place["paths"]) == 1, row["method"] != "fio"
            assert (row["first_write_bytes_per_second"] is not None) is (is_alone and is_ours)
            for figure in row["figures"].values():
                assert list(figure) == [
                    "bytes_per_second",
                    "cpu_milliseconds_per_gib",
                    "bytes_per_second_by_round",
                    "cpu_milliseconds_per_gib_by_round",
                    "share_of_fio",
                    "median_share_of_fio",
                    "share_of_sum",
                    "share_of_unverified",
                    "cpu_over_unverified",
                ]
                assert (figure["share_of_fio"] is not None) is is_ours
                assert (figure["share_of_sum"] is not None) is not is_alone


def test_without_fio_it_says_so_and_measures_ours(no_fio, tmp_path):
    result = run(tmp_path, *TINY)
    assert result.exit_code == 0, result.output
    assert "fio: none" in result.stdout
    assert "fio is not installed" in result.stdout
    for name in ("first write", "write", "read", "mixed", "posix"):
        assert name in result.stdout
    assert "of the sum" not in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_several_paths_are_shown_alone_and_together(fake_fio, two_paths, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run(*two_paths, *TINY)
    assert "all together" in result.stdout
    assert "of the sum" in result.stdout
    assert "are on one drive" in result.stdout


def test_a_path_with_markup_is_printed_as_it_is(no_fio, tmp_path):
    path = tmp_path / "[bold]x[red]"
    path.mkdir()
    assert "[bold]x[red]" in run(path, *TINY).stdout.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--size", "much"], "not a size"),
        (["--block", "5000"], "multiple of 4 KiB"),
        (["--size", "64 KiB", "--block", "64 KiB"], "at least two blocks"),
        (["--throttle", "1GB/s", "--throttle", "1GB/s"], "at most once a path"),
        (["--throttle", "fast"], "not a size"),
        (["--engine", "magic"], "expected auto, posix, aio or gds"),
        (["--verify", "sometimes"], "expected off or checksum"),
        (["--rounds", "0"], "--rounds"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_an_option_that_makes_no_sense_is_a_usage_error(tmp_path, arguments, complaint):
    result = run(tmp_path, *arguments)
    assert result.exit_code == 2
    assert complaint in " ".join(result.stderr.replace("│", " ").split())


def test_a_bad_path_is_an_error_with_a_hint(no_fio, tmp_path):
    result = run(tmp_path, tmp_path / "missing", *TINY)
    assert result.exit_code == 1
    assert "no such directory" in result.stderr
    assert "hint:" in result.stderr
    assert result.stdout == ""


def test_more_than_is_free_is_refused_before_anything_is_written(no_fio, tmp_path, monkeypatch):
    monkeypatch.setattr(io, "open_drive", None)
    result = run(tmp_path, "--size", "900 TiB")
    assert result.exit_code == 1
    assert "hint: lower --size" in result.stderr


# --- what is measured


def test_the_room_of_all_paths_on_one_file_system_is_counted(no_fio, two_paths, monkeypatch):
    real = io.probe_directory
    need_bytes = 2 * 4 * BLOCK_BYTES
    for free_bytes, has_room in ((need_bytes, False), (2 * need_bytes, True)):
        monkeypatch.setattr(
            io,
            "probe_directory",
            lambda path, free_bytes=free_bytes: dataclasses.replace(real(path), free_bytes=free_bytes),
        )
        if has_room:
            measure_io(two_paths, tiny())
        else:
            with pytest.raises(CapacityError, match=r"512\.0 KiB for the files of all engines"):
                measure_io(two_paths, tiny())


def test_fio_works_on_the_very_file_that_ours_has_written(fake_fio, two_paths, monkeypatch):
    inodes, sizes, real = [], [], io.open_drive

    def opens(*arguments, **options):
        tier = real(*arguments, **options)
        inodes.append(os.fstat(tier._file.fd).st_ino)
        return tier

    monkeypatch.setattr(io, "open_drive", opens)

    def visit(self, *, real=Fio.visit):
        sizes.extend(os.fstat(fd).st_size for fd, _ in self._files)
        return real(self)

    monkeypatch.setattr(Fio, "visit", visit)
    measure_io(two_paths, tiny(rounds=1))
    a, b = inodes
    assert {frozenset(call["inodes"]) for call in fake_fio.calls} == {frozenset({a}), frozenset({b}), frozenset({a, b})}
    assert set(sizes) == {4 * BLOCK_BYTES}


def test_fio_gets_the_same_bytes_block_and_depth(fake_fio, tmp_path):
    measure_io([str(tmp_path)], tiny(rounds=1))
    sizes = [
        sorted(
            option
            for option in call["arguments"]
            if option.startswith(("--rw=", "--size", "--offset", "--bs", "--iod"))
        )
        for call in fake_fio.calls[1:]  # the first only tries the engine
    ]
    whole = [f"--bs={BLOCK_BYTES}", "--iodepth=2", "--offset=0", f"--size={4 * BLOCK_BYTES}"]
    half = [f"--bs={BLOCK_BYTES}"] * 2 + ["--iodepth=2"] * 2
    mixed = [*half, "--offset=0", f"--offset={2 * BLOCK_BYTES}", "--rw=rw", "--rw=write"]
    mixed += [f"--size={2 * BLOCK_BYTES}"] * 2
    visit = [[*whole[:3], "--rw=write", whole[3]], [*whole[:3], "--rw=rw", whole[3]], mixed]
    assert sizes == [*visit, *visit]  # a round to warm up, a round


def test_sides_take_turns_and_the_first_round_does_not_count(fake_fio, tmp_path, monkeypatch):
    seen = []
    for side in (Ours, Fio):

        def visit(self):
            seen.append(self.method)
            return {direction: Sample(GIB, float(len(seen)), 0.02) for direction in DIRECTIONS}

        monkeypatch.setattr(side, "visit", visit)
    report = measure_io([str(tmp_path)], tiny(rounds=3))
    assert seen == ["fio", "posix", "posix", "fio"] * 2
    ours, fio = report.places[0].rows
    figure = ours.figures["read"]
    assert figure.bytes_per_second_by_round == (GIB / 3, GIB / 6, GIB / 7)
    assert figure.bytes_per_second == GIB / 6
    assert figure.cpu_milliseconds_per_gib == pytest.approx(20.0)
    assert fio.figures["read"].bytes_per_second_by_round == (GIB / 4, GIB / 5, GIB / 8)
    assert figure.share_of_fio == pytest.approx(5 / 6)
    assert figure.median_share_of_fio == pytest.approx(8 / 7)
    assert fio.figures["read"].share_of_fio is None


def test_together_is_compared_with_the_sum_of_each_alone_by_the_same_side(no_fio, two_paths, monkeypatch):
    def visit(self):
        seconds = 1.0 if "drives" in self.how else 2.0 if "/a" in self.how else 4.0
        return {direction: Sample(GIB, seconds, 0.0) for direction in DIRECTIONS}

    monkeypatch.setattr(Ours, "visit", visit)
    report = measure_io(two_paths, tiny())
    figure = report.places[-1].rows[0].figures["write"]
    assert figure.share_of_sum == pytest.approx(1 / (1 / 2 + 1 / 4))
    assert report.places[0].rows[0].figures["write"].share_of_sum is None


def test_stores_and_loads_of_the_mixed_pass_are_half_of_the_bytes_each(no_fio, tmp_path, monkeypatch):
    calls = []
    for name, real in (("pwritev", os.pwritev), ("preadv", os.preadv)):

        def moves(fd, buffers, offset, *, name=name, real=real):
            if memoryview(buffers[0]).nbytes == BLOCK_BYTES:
                calls.append((name, offset))
            return real(fd, buffers, offset)

        monkeypatch.setattr(os, name, moves)
    measure_io([str(tmp_path)], tiny(rounds=1))
    all_offsets = {index * BLOCK_BYTES for index in range(4)}
    first_write, visit = calls[:4], calls[4 : 4 + 18]
    assert {offset for _, offset in first_write} == all_offsets
    assert len(calls) == 4 + 2 * 18  # one visit to warm up and one that counts
    assert {call for call in visit[:4]} == {("pwritev", offset) for offset in all_offsets}
    assert {call for call in visit[4:8]} == {("preadv", offset) for offset in all_offsets}
    compared, mixed = visit[8:10], visit[10:14]
    assert sorted(name for name, _ in mixed) == ["preadv", "preadv", "pwritev", "pwritev"]
    assert {offset for _, offset in mixed} == all_offsets
    # What is written over is compared before, and all at the end.
    assert {offset for _, offset in compared} == {offset for name, offset in mixed if name == "pwritev"}
    assert {call for call in visit[14:]} == {("preadv", offset) for offset in all_offsets}


def test_before_the_striped_write_is_a_pass_that_is_not_timed_for_the_drives_speeds_are_those_of_mixed(
    no_fio, two_paths, monkeypatch
):
    writes, real = [], os.pwritev

    def counts(fd, buffers, offset):
        writes.append(memoryview(buffers[0]).nbytes == BLOCK_BYTES)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", counts)
    report = measure_io(two_paths, tiny(rounds=1))
    alone = 4 + 2 * (4 + 2)  # the first write, and two visits
    assert sum(writes) == 2 * alone + 2 * (4 + 4 + 2)
    assert len(report.places[-1].rows[0].figures["write"].bytes_per_second_by_round) == 1


def test_a_throttle_slows_the_last_path_and_fio_is_not_compared_with_it(fake_fio, two_paths):
    report = measure_io(two_paths, tiny(throttles=(int(1e12),)))
    assert [place.throttles for place in report.places] == [(None,), (10**12,), (None, 10**12)]
    assert [[row.method for row in place.rows] for place in report.places] == [["posix", "fio"], ["posix"], ["posix"]]
    assert "throttled to 1000.00 GB/s" in report.places[1].rows[0].how
    assert any("is throttled" in remark for remark in report.remarks)


def test_through_the_page_cache_fio_goes_the_same_way_and_it_is_said(fake_fio, tmp_path, monkeypatch):
    real = os.open

    def no_direct(path, flags, *rest, **options):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", no_direct)
    report = measure_io([str(tmp_path)], tiny())
    assert any("page cache" in remark for remark in report.remarks)
    assert all("--direct=0" in call["arguments"] for call in fake_fio.calls)


def test_an_engine_is_measured_once_however_often_it_is_named(no_fio, tmp_path):
    report = measure_io([str(tmp_path)], tiny(engines=("auto", "posix")))
    assert [row.method for row in report.places[0].rows] == ["posix"]


def test_an_odd_number_of_blocks_is_rounded_down_for_equal_halves():
    assert tiny(size_bytes=7 * BLOCK_BYTES + 1).num_blocks == 6
    assert tiny(size_bytes=1).num_blocks == 2


# --- what `verify: checksum` costs


def test_by_default_an_engine_is_measured_with_checksums_and_without(fake_fio, two_paths, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run(*two_paths, *SMALL)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("verify: checksum, posix: ")]
    assert len(lines) == 3  # each path, and both
    for line in lines:
        assert all(f"{direction} " in line for direction in DIRECTIONS)
    assert "posix, checksum" in result.stdout
    report = json.loads(run(*two_paths, *SMALL, "--json").stdout)
    for place in report["places"]:
        sides = [(row["method"], row["verify"]) for row in place["rows"]]
        assert sides == [("posix", "off"), ("posix", "checksum"), ("fio", "off")]
        for row in place["rows"]:
            for figure in row["figures"].values():
                assert (figure["share_of_unverified"] is not None) is (row["verify"] == "checksum")
                assert (figure["share_of_fio"] is not None) is (row["method"] != "fio")
                assert figure["cpu_milliseconds_per_gib"] >= 0
                assert len(figure["bytes_per_second_by_round"]) == 2


def test_the_side_with_checksums_hashes_every_store_and_load_as_training_does(no_fio, tmp_path, monkeypatch):
    """Nobody else hashes, and the tier compares: a bit that turns over is its error, before we look at the bytes."""
    hashed, real = [], Digest.update

    def counts(self, memory):
        hashed.append(memory.numel())
        real(self, memory)

    monkeypatch.setattr(Digest, "update", counts)
    measure_io([str(tmp_path)], tiny(rounds=1))
    assert hashed == []
    measure_io([str(tmp_path)], tiny(rounds=1, verify=("off", "checksum")))
    stored, loaded, compared = 4 + 2, 4 + 2, 2 + 4
    assert sum(hashed) == BLOCK_BYTES * (4 + 2 * (stored + loaded + compared))  # the first write, and two visits

    reads = os.preadv

    def corrupts(fd, buffers, offset):
        count = reads(fd, buffers, offset)
        if count == BLOCK_BYTES:
            memoryview(buffers[0]).cast("B")[7] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", corrupts)
    with pytest.raises(LoadError, match="checksum"):
        measure_io([str(tmp_path)], tiny(verify=("checksum",)))


def test_the_cost_is_the_median_of_the_ratios_of_single_rounds(no_fio, tmp_path, monkeypatch):
    seen = []

    def visit(self):
        seen.append(self.verify)
        seconds, cpu_seconds = (2.0, 0.03) if self.verify == "checksum" else (1.0, 0.02)
        both = len(seen) + len(seen) % 2  # the machine gets slower from round to round, for both sides
        return {direction: Sample(GIB, seconds * both, cpu_seconds * both) for direction in DIRECTIONS}

    monkeypatch.setattr(Ours, "visit", visit)
    report = measure_io([str(tmp_path)], tiny(rounds=3, verify=("off", "checksum")))
    assert seen == ["checksum", "off", "off", "checksum"] * 2
    plain, checked = report.places[0].rows
    for direction in DIRECTIONS:
        assert plain.figures[direction].share_of_unverified is None
        assert checked.figures[direction].share_of_unverified == pytest.approx(0.5)
        assert checked.figures[direction].cpu_over_unverified == pytest.approx(1.5)


def test_a_round_in_which_the_clock_of_cpu_time_stood_still_does_not_count(no_fio, tmp_path, monkeypatch):
    def visit(self):
        return {direction: Sample(GIB, 1.0, 0.0) for direction in DIRECTIONS}

    monkeypatch.setattr(Ours, "visit", visit)
    report = measure_io([str(tmp_path)], tiny(verify=("off", "checksum")))
    assert report.places[0].rows[1].figures["write"].cpu_over_unverified is None
    assert "write 1.00x / -" in run(tmp_path, *SMALL).stdout


def test_the_files_of_both_are_counted_before_anything_is_written(no_fio, tmp_path, monkeypatch):
    real = io.probe_directory
    room_bytes = int(1.5 * 4 * BLOCK_BYTES)
    monkeypatch.setattr(io, "probe_directory", lambda path: dataclasses.replace(real(path), free_bytes=room_bytes))
    measure_io([str(tmp_path)], tiny())
    with pytest.raises(CapacityError, match=r"512\.0 KiB for the files of all engines"):
        measure_io([str(tmp_path)], tiny(verify=("off", "checksum")))


# --- when something fails


def test_fio_that_fails_on_the_way_costs_the_comparison_only(fake_fio, two_paths):
    fake_fio.order(fails_from_call=9)
    result = run(*two_paths, *TINY)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("there is no comparison: fio failed") == 1
    report = measure_io(two_paths, tiny())  # it fails from the start now
    assert [[row.method for row in place.rows] for place in report.places] == [["posix"]] * 3
    assert report.fio is None


@pytest.mark.parametrize("place", [0, BLOCK_BYTES // 2, BLOCK_BYTES - 1])
def test_a_byte_that_comes_back_changed_is_found(no_fio, tmp_path, monkeypatch, place):
    real = os.preadv

    def corrupts(fd, buffers, offset):
        count = real(fd, buffers, offset)
        if count == BLOCK_BYTES:
            memoryview(buffers[0]).cast("B")[place] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", corrupts)
    with pytest.raises(LoadError, match="bytes came back changed"):
        measure_io([str(tmp_path)], tiny())
    result = run(tmp_path, *TINY)
    assert result.exit_code == 1
    assert "bytes came back changed" in result.stderr


@pytest.mark.parametrize("number", [5, 8, 9, 10])
def test_a_write_that_did_not_happen_is_found(no_fio, tmp_path, monkeypatch, number):
    """4 of the first write; then 4 of a visit's writes, and 2 of its mixed pass."""
    real, seen = os.pwritev, []

    def loses_one(fd, buffers, offset):
        nbytes = memoryview(buffers[0]).nbytes
        if nbytes == BLOCK_BYTES:
            seen.append(offset)
            if len(seen) == number:
                return nbytes
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", loses_one)
    with pytest.raises(LoadError, match="bytes came back changed"):
        measure_io([str(tmp_path)], tiny())


def test_a_store_that_fails_ends_it_with_the_tiers_words(no_fio, tmp_path, monkeypatch):
    def fails(fd, buffers, offset):
        raise OSError(5, "Input/output error")

    real = io.probe_directory(str(tmp_path))
    monkeypatch.setattr(io, "probe_directory", lambda path: real)
    monkeypatch.setattr("ssdtrain_plugin.storage.drive.probe_directory", lambda path: real)
    monkeypatch.setattr(os, "pwritev", fails)
    with pytest.raises(StoreError, match="Input/output error"):
        measure_io([str(tmp_path)], tiny())
    result = run(tmp_path, *TINY)
    assert result.exit_code == 1
    assert "Input/output error" in result.stderr


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_an_interrupt_leaves_nothing_behind(fake_fio, tmp_path, after):
    steps = []

    def interrupts(what, done, total):
        steps.append(what)
        if len(steps) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_io([str(tmp_path)], tiny(), interrupts)
    assert list(tmp_path.iterdir()) == []  # threads and open files: the fixture of all tests looks after them


def test_progress_names_the_sides_and_ends_at_the_end(no_fio, two_paths):
    seen = []
    measure_io(two_paths, tiny(), lambda *step: seen.append(step))
    a, b = two_paths
    assert [what for what, _, _ in seen[:5]] == [
        f"{a}: posix",
        f"{b}: posix",
        f"{a} + {b}: posix",
        f"{b}: posix",
        f"{a}: posix",
    ]
    assert [done for _, done, _ in seen] == list(range(len(seen)))
    assert {total for _, _, total in seen} == {len(seen) - 1}


# --- buffers


def test_a_buffer_is_told_from_one_of_another_transfer():
    arena = HostArena(CpuStreams())
    buffers = Buffers(arena, BLOCK_BYTES, count=1)
    with buffers.borrow(7) as buffer:
        copy = buffer.clone()
        assert buffers.is_as_stored(buffer, 7)
        assert not buffers.is_as_stored(buffer, 8)
    with buffers.borrow(8) as buffer:
        assert not buffers.is_as_stored(buffer, 7)
        buffer[-8:] = copy[-8:]  # torn: the beginning of one and the end of another
        assert not buffers.is_as_stored(buffer, 8)
        assert not buffers.is_as_stored(buffer, 7)
        buffer[:8] = copy[:8]
        assert buffers.is_as_stored(buffer, 7)
    arena.close()


def test_a_buffer_comes_back_after_an_error():
    arena = HostArena(CpuStreams())
    buffers = Buffers(arena, BLOCK_BYTES, count=1)
    with pytest.raises(ZeroDivisionError), buffers.borrow(1):
        raise ZeroDivisionError
    with buffers.borrow(2):
        pass
    arena.close()


def test_the_share_of_huge_pages_is_that_of_the_buffers_alone(monkeypatch):
    smaps = (
        "1000-3000 rw-p 00000000 00:00 0 \nSize: 8 kB\nRss:  8 kB\nAnonHugePages:  4 kB\n"
        "5000-6000 rw-p 00000000 00:00 0   [heap]\nRss:  4 kB\nAnonHugePages:  0 kB\n"
        "7000-9000 rw-p 00000000 00:00 0 \nRss:  8 kB\nAnonHugePages:  8 kB\n"
    )
    monkeypatch.setattr(io.Path, "read_text", lambda self, *_, **__: smaps)
    assert io._huge_page_share([0x1000, 0x7800]) == 12 / 16
    assert io._huge_page_share([0x6000]) is None
    monkeypatch.setattr(io.Path, "read_text", lambda self, *_, **__: open("/nonexistent"))
    assert io._huge_page_share([0x1000]) is None
