"""The report says what is in the files, all of it, and says which lines it could not read."""

import json
import re
from collections import defaultdict

import browser
import pytest
from clocks import ManualClock
from report_checks import Page, check_page, events_of, expect
from report_runs import train, write_events, write_steps
from typer.testing import CliRunner

from ssdtrain_plugin.cli import app
from ssdtrain_plugin.errors import ConfigError
from ssdtrain_plugin.report.chrome import chrome_events
from ssdtrain_plugin.report.drawing import COLOURS, THEMES
from ssdtrain_plugin.report.numbers import NUM_BINS, bandwidth, layer_of, memory, tracks_of
from ssdtrain_plugin.report.reading import read_run

pytest.importorskip("matplotlib")


def report(run, *options):
    return CliRunner().invoke(app, ["report", str(run), *map(str, options)])


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A real run as rank 0, and ranks 1 and 2 by hand; the last one recorded nothing."""
    directory = tmp_path_factory.mktemp("job")
    run = train(directory)
    write_steps(run, 1)
    write_events(run, 1, ManualClock())
    write_steps(run, 2)
    result = report(run, "--output", directory / "page.html", "--trace", directory / "trace.json")
    assert result.exit_code == 0, result.output
    return directory, run


@pytest.fixture(scope="module")
def page_text(job):
    return (job[0] / "page.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------------- the page


def test_every_number_of_the_page_is_that_of_the_files(job, page_text):
    page = check_page(page_text, job[1])
    families = {key.partition("/")[0] for key in page.numbers}
    assert families == {"total", "step", "plan", "timed", "transfer", "layer", "failures"}
    assert page.numbers["layer/1/layers.0/stored_bytes"][0] == 4096
    assert page.numbers["transfer/1/load/ssd/0/num_on_demand"][0] == 1
    assert page.numbers["transfer/1/store/ssd/0/bytes_per_second"][0] == pytest.approx(4096 / 0.4)
    assert page.numbers["timed/1/0/rest_seconds"][0] == pytest.approx(0.0, abs=1e-9)


def test_the_checker_sees_a_wrong_number(job, page_text):
    wrong = page_text.replace('data-value="4096"', 'data-value="4097"', 1)
    assert wrong != page_text
    with pytest.raises(AssertionError):
        check_page(wrong, job[1])
    with pytest.raises(AssertionError, match="without a key"):
        check_page(page_text.replace("<tbody><tr>", "<tbody><tr><td>17</td>", 1), job[1])


def test_the_page_needs_nothing_from_outside(page_text):
    page = Page(page_text)
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"""(?:src|href|url\()\s*=?\s*["']?(?:https?:)?//""", page_text)
    assert "@import" not in page_text
    assert set(re.findall(r"<script[^>]*>", page_text)) == {'<script type="application/json" id="series">'}


def test_pictures_have_words_and_their_own_names(page_text):
    page = Page(page_text)
    assert len(page.labels) == 4
    assert all(len(label) > 40 for label in page.labels)
    names = re.findall(r'\bid="([^"]+)"', page_text)
    assert len(names) == len(set(names))
    targets = set(re.findall(r"url\(#([^)]+)\)", page_text)) | {link[1:] for link in page.links}
    assert targets <= set(names)


def test_colours_follow_the_theme(page_text):
    pictures = re.findall(r"<svg.*?</svg>", page_text, flags=re.DOTALL)
    for picture in pictures:
        colours = set(re.findall(r"#[0-9a-f]{6}\b", picture))
        assert not colours, "a colour that is the same on white and on black"
        assert "var(--ink)" in picture
    style = page_text[: page_text.index("</style>")]
    assert all(f"--{role}: {colour}" in style for role, pair in THEMES.items() for colour in pair)


def _luminance(colour):
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(left, right):
    low, high = sorted((_luminance(left), _luminance(right)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("theme", "paper"), [(0, "#ffffff"), (1, "#15171a")])
def test_text_and_lines_stand_out_from_the_paper(theme, paper, page_text):
    assert f"--paper: {paper}" in page_text
    assert _contrast(THEMES["ink"][theme], paper) > 7
    for role in set(THEMES) - {"ink", "grid", "inside"}:
        assert _contrast(THEMES[role][theme], paper) > (2 if theme == 0 else 4), role


def test_colours_differ_for_people_who_see_two_primaries():
    """Simulated with the matrices of Vienot, Brettel and Mollon (1999) for deuteranopia and protanopia."""
    matrices = [
        [(0.29275, 0.70725, -0.02234), (0.29275, 0.70725, -0.02234), (0.0, 0.0, 1.0)],
        [(0.10889, 0.89111, -0.00447), (0.10889, 0.89111, 0.00447), (0.0, 0.0, 1.0)],
    ]
    pairs = [("blue", "orange"), ("green", "purple"), ("red", "green"), ("red", "purple"), ("blue", "green")]
    for matrix in matrices:
        for one, other in pairs:
            seen = []
            for role in (one, other):
                colour = [int(COLOURS[role][index : index + 2], 16) / 255 for index in (1, 3, 5)]
                seen.append([sum(row[i] * colour[i] for i in range(3)) for row in matrix])
            distance = sum((a - b) ** 2 for a, b in zip(*seen, strict=True)) ** 0.5
            assert distance > 0.12, (one, other)


def test_pictures_are_written_beside_the_page(job):
    names = sorted(path.name for path in job[0].glob("page*"))
    assert names == ["page-bandwidth.png", "page-memory.png", "page-steps.png", "page-timeline.png", "page.html"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in job[0].glob("page-*.png"))


def test_names_from_the_files_cannot_leave_their_place(tmp_path):
    hostile = '</script><script>alert(1)</script><b x="'
    write_steps(tmp_path, 0, plan=hostile, failures={hostile: 1})
    write_events(tmp_path, 0, ManualClock(), module=hostile)
    result = report(tmp_path, "--output", tmp_path / "page.html", "--trace", tmp_path / "trace.json")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "<b x=" not in text
    check_page(text, tmp_path)
    assert any(hostile in event["name"] for event in json.loads((tmp_path / "trace.json").read_text()))


def test_without_events_the_page_says_how_to_get_them(tmp_path):
    write_steps(tmp_path, 0)
    result = report(tmp_path, "--output", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    page = check_page((tmp_path / "page.html").read_text(encoding="utf-8"), tmp_path)
    assert any("trace_steps" in data for _, data in page.words)
    refused = report(tmp_path, "--output", tmp_path / "page.html", "--trace", tmp_path / "trace.json")
    assert refused.exit_code == 2
    assert "trace_steps" in refused.output


def test_a_long_run_shows_its_first_and_last_steps(tmp_path):
    write_steps(tmp_path, 0, num_steps=500)
    assert report(tmp_path, "--output", tmp_path / "page.html").exit_code == 0
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    shown = {int(key.split("/")[2]) for key in page.numbers if key.startswith("step/0/")}
    assert shown == {0, 1, 2, *range(403, 500)}
    assert page.numbers["total/steps"][0] == 500


def test_the_step_of_the_time_line_can_be_chosen(job, tmp_path):
    assert report(job[1], "--output", tmp_path / "page.html", "--step", 2).exit_code == 0
    assert "milliseconds since step 2 began" in (tmp_path / "page.html").read_text(encoding="utf-8")
    refused = report(job[1], "--output", tmp_path / "page.html", "--step", 77)
    assert refused.exit_code == 2
    assert "77 was not recorded" in refused.output


@pytest.mark.parametrize(("most", "unit"), [(10_000, "milliseconds"), (100, "seconds")])
def test_the_time_line_of_a_long_step_is_in_seconds(tmp_path, monkeypatch, most, unit):
    monkeypatch.setattr("ssdtrain_plugin.report.drawing._MOST_MILLISECONDS", most)
    write_steps(tmp_path / "run", 0)
    write_events(tmp_path / "run", 0, ManualClock())
    assert report(tmp_path / "run", "--output", tmp_path / "page.html").exit_code == 0
    assert f">{unit} since step 0 began<" in (tmp_path / "page.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------------- reading


def test_a_damaged_line_is_named_and_left_out(tmp_path):
    write_steps(tmp_path, 0, num_steps=3)
    write_events(tmp_path, 0, ManualClock())
    steps, events = tmp_path / "rank0.jsonl", tmp_path / "rank0.trace.jsonl"
    lines = steps.read_text().splitlines()
    lines[1] = lines[1].replace('"step": 1', '"step": "one"')
    steps.write_text("\n".join(lines) + '\n{"step": 3, "ra', encoding="utf-8")
    with events.open("ab") as file:
        file.write(b'\xff\xfe\n{"event": "pass"}\n{"event": "dance"}\n[1]\n' + b"[" * 100_000 + b"\n")
        file.write(b'{"event":"memory","step":0,"at":NaN,"device_bytes":0,"would_be_bytes":0,"host_bytes":0}\n')
    run = read_run(tmp_path)
    assert [step.step for step in run.ranks[0].steps] == [0, 2]
    named = [problem.partition(": left out")[0] for problem in run.problems]
    count = len(events.read_bytes().splitlines())
    assert named[:2] == ["rank0.jsonl, line 2", "rank0.jsonl, line 4"]
    assert named[2:] == [f"rank0.trace.jsonl, line {number}" for number in range(count - 5, count + 1)]
    assert "(cut off)" in run.problems[1]
    result = report(tmp_path, "--output", tmp_path / "page.html")
    assert result.exit_code == 0
    assert result.output.count("warning: ") == 8
    assert "rank0.jsonl, line 4: left out (cut off)" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_file_that_is_no_such_file_does_not_fill_the_page(tmp_path):
    write_steps(tmp_path, 0)
    (tmp_path / "rank1.jsonl").write_text("x\n" * 5000)
    problems = read_run(tmp_path).problems
    assert len(problems) == 21
    assert problems[-1] == "rank1.jsonl: 4980 more lines left out"


def test_of_two_runs_in_the_same_files_the_last_one_is_shown(tmp_path):
    for plan in ("old", "new"):
        write_steps(tmp_path, 0, num_steps=3, plan=plan)
    run = read_run(tmp_path)
    assert [step.plan for step in run.ranks[0].steps] == ["new"] * 3
    assert run.num_earlier == 1
    assert report(tmp_path, "--output", tmp_path / "page.html").exit_code == 0
    assert "the last one is shown" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_nodes_may_have_a_directory_each(tmp_path):
    for rank in range(2):
        (tmp_path / f"node{rank}").mkdir()
        write_steps(tmp_path / f"node{rank}", rank)
    assert [rank.rank for rank in read_run(tmp_path).ranks] == [0, 1]


@pytest.mark.parametrize("case", ["missing", "empty", "other files", "no step", "rank twice"])
def test_nothing_to_report_on_is_one_clear_error(tmp_path, case):
    run = tmp_path / "run"
    if case != "missing":
        run.mkdir()
    if case == "other files":
        (run / "notes.txt").write_text("x")
        write_events(run, 0, ManualClock())
    if case == "no step":
        (run / "rank0.jsonl").write_text('{"step"')
    if case == "rank twice":
        for node in ("a", "b"):
            (run / node).mkdir()
            write_steps(run / node, 0)
    result = report(run, "--output", tmp_path / "page.html")
    assert result.exit_code == 1
    words = {"missing": "no such directory", "no step": "no finished step", "rank twice": "rank 0 twice"}
    assert words.get(case, "no file `rank<N>.jsonl`") in result.output
    assert "stats_path" in result.output
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(ConfigError):
        read_run(run)


def test_a_page_that_cannot_be_written_is_an_error_without_a_traceback(job, tmp_path):
    result = report(job[1], "--output", tmp_path / "missing" / "page.html")
    assert result.exit_code == 1
    assert "No such file" in result.output


# ---------------------------------------------------------------------- clocks, layers, curves


def test_ranks_are_laid_over_each_other_by_the_time_of_day(tmp_path):
    for rank, (clock, wall) in enumerate([(5.0, 100.0), (7000.0, 100.5)]):
        write_steps(tmp_path, rank)
        write_events(tmp_path, rank, ManualClock(clock), wall_seconds=wall)
    run = read_run(tmp_path)
    begins = [run.seconds_of(rank, rank.passes[0].begin) for rank in run.ranks]
    assert begins == pytest.approx([0.0, 0.5], abs=1e-6)
    assert [chart.series[0].x[0] for chart in memory(run)] == pytest.approx([0.0, 0.5], abs=1e-6)


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("module.decoder.layers.3.mlp.linear_fc1", "module.decoder.layers.3"),
        ("transformer.wte", "transformer"),
        ("4.up", "4"),
        ("", "(outside of named modules)"),
        (None, "(outside of named modules)"),
    ],
)
def test_a_layer_is_all_up_to_the_first_number(module, layer):
    assert layer_of(module) == layer


def test_bandwidth_loses_no_bytes(job):
    for chart in bandwidth(read_run(job[1])):
        kinds = events_of(job[1], chart.rank)
        width = (kinds["step"][-1]["end"] - kinds["step"][0]["begin"]) / NUM_BINS
        done = [event for event in kinds["transfer"] if event["outcome"] == "done"]
        whole = sum(event["nbytes"] for event in done if event["direction"] in ("store", "load"))
        assert sum(sum(series.y) for series in chart.series) * width == pytest.approx(whole, rel=0.02)


def test_a_long_curve_keeps_its_peaks(tmp_path):
    write_steps(tmp_path, 0)
    write_events(tmp_path, 0, ManualClock())
    path = tmp_path / "rank0.trace.jsonl"
    sample = {"event": "memory", "step": 0, "would_be_bytes": 1, "host_bytes": 0, "drive_bytes": 0}
    with path.open("a") as file:
        for index in range(10_000):
            value = 9999 if index == 7777 else index % 10
            file.write(json.dumps(sample | {"at": 3 + index / 1e4, "device_bytes": value}) + "\n")
    (chart,) = memory(read_run(tmp_path))
    assert len(chart.series[1].x) <= 2000
    assert max(chart.series[1].y) == 9999
    assert chart.series[1].x == sorted(chart.series[1].x)


# ---------------------------------------------------------------------- Chrome's format


def test_the_chrome_trace_has_every_event(job):
    events = json.loads((job[0] / "trace.json").read_text())
    assert events == list(chrome_events(read_run(job[1])))
    for rank in (0, 1):
        kinds = events_of(job[1], rank)
        own = [event for event in events if event["pid"] == rank]
        spans = defaultdict(int)
        for event in own:
            if event["ph"] == "X":
                spans[event["cat"]] += 1
        moved = [event for event in kinds["transfer"] if event["outcome"] != "cancelled"]
        assert spans["transfer"] == len(moved)
        assert spans["pass"] == len(kinds["pass"])
        assert spans["wait"] == len(kinds["wait"])
        assert sum(event["ph"] == "C" for event in own) == 4 * len(kinds["memory"])
        names = [event["args"]["name"] for event in own if event["name"] == "process_name"]
        assert names == [f"rank {rank}"]
    assert not [event for event in events if event["pid"] == 2]


def test_no_two_spans_of_a_track_overlap_unless_one_is_inside_the_other(job):
    tracks = defaultdict(list)
    for event in json.loads((job[0] / "trace.json").read_text()):
        if event["ph"] == "X":
            assert event["dur"] >= 0
            tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(tracks) > 4
    slack = 0.01  # microseconds; times are rounded to a thousandth
    for spans in tracks.values():
        spans.sort(key=lambda span: (span[0], -span[1]))
        inside = []
        for begin, end in spans:
            while inside and inside[-1] <= begin + slack:
                inside.pop()
            assert not inside or end <= inside[-1] + slack
            inside.append(end)


def test_transfers_that_overlap_get_tracks_of_their_own(job):
    transfers = read_run(job[1]).ranks[1].transfers
    assert [len(track) for track in tracks_of(transfers)] == [3, 1]


def test_the_numbers_of_a_hand_written_rank_are_those_expected(job):
    numbers, _ = expect(job[1])
    assert numbers["timed/1/0/wait_seconds"] == pytest.approx(0.25)
    assert numbers["transfer/1/store/ssd/0/num_cancelled"] == 1
    assert numbers["failures/1/1/ssd: EIO"] == 2


# ---------------------------------------------------------------------- the looks


@pytest.mark.slow
def test_the_page_looks_right_in_a_browser(job, tmp_path):
    browser.check_looks(job[0] / "page.html", tmp_path)  # another test lists what is beside the page
