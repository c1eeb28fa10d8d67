"""What a run has left, as ``ssdtrain report`` finds it: shown, or one error that names the directory."""

import json
import os

import pytest
from hostile import accepted_or_refused, changed, each_input, plain_values
from hypothesis import given
from hypothesis import strategies as st

from ssdtrain_plugin.events import PassEvent, StartEvent, StepEvent
from ssdtrain_plugin.report import read_run, write_page
from ssdtrain_plugin.report.chrome import chrome_events
from ssdtrain_plugin.stats import StepStats

NUMBERS = {"failures": {"{no $space^": 1}, "plan": "$x_{ <script> \\frac"}
STEP = {name: NUMBERS.get(name, 1) for name in StepStats.__dataclass_fields__}
EVENTS = [
    {"event": "start", "rank": 1, "clock_seconds": 1.0, "wall_seconds": 2.0, "device": "cpu"},
    {
        "event": "pass",
        "step": 1,
        "kind": "forward",
        "microbatch": 0,
        "slot": "$_{",
        "begin": 1.0,
        "end": 2.0,
        "is_exact": True,
    },
    {"event": "save", "step": 1, "at": 1.0, "serial": 1, "microbatch": 0, "module": "$^{", "nbytes": 9},
    {
        "event": "memory",
        "step": 1,
        "at": 1.0,
        "device_bytes": 1,
        "would_be_bytes": 1,
        "host_bytes": 0,
        "drive_bytes": 0,
    },
    {"event": "instruction", "step": 1, "name": "$\\frac{", "begin": 1.0, "end": 2.0},
    {"event": "wait", "step": 1, "reason": "load", "serial": None, "module": None, "begin": 1.0, "end": 2.0},
    {"event": "step", "step": 1, "begin": 0.5, "end": 2.0, "plan": "p"},
]


def _written(value, how):
    try:
        text = json.dumps(value)
    except ValueError:
        text = "9" * 10_000
    return {"whole": text, "cut": text[: len(text) // 2], "noise": f"{text}\0\x1b[2J", "twice": text + text}[how]


hows = st.sampled_from(["whole"] * 5 + ["cut", "noise", "twice"])
lines = st.one_of(
    st.just(STEP),
    changed(STEP, plain_values),
    st.sampled_from(EVENTS).flatmap(lambda event: changed(event, plain_values)),
    plain_values,
)
texts_of_lines = st.lists(st.builds(_written, lines, hows), max_size=4)


@pytest.fixture
def run(tmp_path):
    """A run of two ranks that is as it should be."""
    folder = tmp_path / "run"
    folder.mkdir()
    for rank in (0, 1):
        (folder / f"rank{rank}.jsonl").write_text(json.dumps({**STEP, "rank": rank}) + "\n")
        events = [{**event, "rank": rank} if "rank" in event else event for event in EVENTS]
        (folder / f"rank{rank}.trace.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def _shown(folder):
    found = read_run(folder)
    json.dumps(list(chrome_events(found)), allow_nan=False)
    assert all(len(problem) < 20_000 for problem in found.problems)
    return found


@each_input()
@given(st.data())
def test_any_lines(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "any_run"
    folder.mkdir(exist_ok=True)
    for name in ("rank0.jsonl", "rank0.trace.jsonl", "rank1.jsonl"):
        head = [json.dumps(STEP if "trace" not in name else EVENTS[0])] if data.draw(st.booleans()) else []
        text = "\n".join([*head, *data.draw(texts_of_lines)]) + data.draw(st.sampled_from(["\n", ""]))
        (folder / name).write_bytes(text.encode(errors="surrogatepass"))
    accepted_or_refused(lambda: _shown(folder), f"`{folder}`")


def test_the_run_that_is_right_is_drawn_whatever_its_names_are(run, tmp_path):
    pytest.importorskip("matplotlib")
    found = _shown(run)
    assert found.problems == []
    page, *_ = write_page(found, tmp_path / "report.html")
    assert "<script> \\frac" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps({**STEP, "stored_bytes": 10**30}), "100000000000000000000000000000 is no number that we write"),
        (json.dumps(STEP).replace('"stall_seconds": 1', '"stall_seconds": 1e999'), "1e999 is no finite number"),
        (json.dumps(STEP).replace('"step": 1', '"step": NaN'), "NaN is no number that we write"),
        ("[" * 100_000, "not JSON"),
        ("x" * (9 << 20), "longer than 4.0 MiB"),
    ],
    ids=["large", "infinite", "no number", "deep", "long"],
)
def test_a_line_that_no_rank_wrote_is_named_and_left_out(run, text, reason):
    with (run / "rank0.jsonl").open("a", encoding="utf-8") as file:
        file.write(text + "\n" + json.dumps({**STEP, "rank": 0, "step": 2}) + "\n")
    found = _shown(run)
    assert [step.step for step in found.ranks[0].steps] == [1, 2]
    assert len(found.problems) == 1
    assert "line 2: left out" in found.problems[0]
    assert reason in found.problems[0]


def test_pipes_and_devices_are_no_ranks(run):
    (run / "rank0.jsonl").unlink()
    os.mkfifo(run / "rank0.jsonl")
    (run / "rank2.jsonl").symlink_to("/dev/zero")
    assert [rank.rank for rank in _shown(run).ranks if rank.steps] == [1]


def test_the_events_here_are_those_that_are_written():
    for kind, index in ((StartEvent, 0), (PassEvent, 1), (StepEvent, -1)):
        kind(**EVENTS[index])
