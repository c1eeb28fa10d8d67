"""Computes what ``ssdtrain plan --from-run`` says was measured again, from the lines of the files alone."""

from collections import Counter
from statistics import median

import pytest
from report_checks import busy_seconds, events_of, lines, ranks_of

WARM_UP = 2
YEAR_SECONDS = 365.25 * 24 * 3600


def measured(directory, rank, *, micro_batches, rated_bytes):
    """Give every term of one rank by its name; of a run with traced steps on a CPU, one drive a rank."""
    steps = [step for step in lines(directory / f"rank{rank}.jsonl") if step["step"] >= WARM_UP]
    kinds = events_of(directory, rank)
    lengths = {each["step"]: each["end"] - each["begin"] for each in kinds["step"]}
    assert lengths
    assert min(lengths) >= WARM_UP

    def middle(name):
        return median(step[name] for step in steps)

    def rate(*directions):
        done = [each for each in kinds["transfer"] if each["outcome"] == "done" and each["direction"] in directions]
        assert {each["tier"] for each in done} == {"ssd"}
        return sum(each["nbytes"] for each in done) / busy_seconds([(each["begin"], each["end"]) for each in done])

    saved = Counter()
    for each in kinds["save"]:
        saved[each["microbatch"]] += each["nbytes"]
    (one, _), *_ = Counter(saved.values()).most_common(1)
    passes = middle("forward_seconds") + middle("backward_seconds")
    written = middle("stored_bytes")
    terms = {
        "saved in a micro-batch": one,
        "saved at the highest, all in flight": middle("saved_bytes"),
        "live at the highest, offloading": middle("peak_activation_bytes"),
        "share chosen to be offloaded": 1 - middle("kept_bytes") / (one * micro_batches),
        "stored on drives in a step": written,
        "copied to host memory in a step": middle("host_bytes"),
        "handed back from memory in a step": middle("forwarded_bytes"),
        "loaded in a step": middle("loaded_bytes"),
        "forward of a micro-batch": middle("forward_seconds") / micro_batches,
        "backward of a micro-batch": middle("backward_seconds") / micro_batches,
        "write needed": 2 * written / passes,
        "read needed": middle("loaded_bytes") / middle("backward_seconds"),
        "stalls in a step": middle("stall_seconds"),
        "write reached": rate("store"),
        "read reached": rate("load"),
        "life of the drives, without a pause": rated_bytes / written * passes / YEAR_SECONDS,
        "life of the drives, in a step's time": rated_bytes / written * median(lengths.values()) / YEAR_SECONDS,
    }
    if kinds["instruction"]:
        waits = dict.fromkeys(lengths, 0.0)
        for each in kinds["instruction"]:
            if each["name"] in ("RecvActivation", "RecvGrad"):
                waits[each["step"]] += each["end"] - each["begin"]
        terms["waits for other stages in a step"] = median(waits.values())
    return terms, median(lengths.values())


def check_calibration(report, directory, *, micro_batches, rated_bytes):
    """Compare the JSON of a plan with the files of its run, one rank a stage; bytes must be off by nothing."""
    found = report["calibration"]
    assert [stage["ranks"] for stage in found["stages"]] == [[rank] for rank in ranks_of(directory)]
    lengths = []
    for stage, plan in zip(found["stages"], report["stages"], strict=True):
        terms = {term["name"]: term for term in stage["terms"]}
        expected, length = measured(directory, stage["ranks"][0], micro_batches=micro_batches, rated_bytes=rated_bytes)
        lengths.append(length)
        assert terms.keys() == expected.keys()
        for name, term in terms.items():
            assert term["measured"] == pytest.approx(expected[name], rel=1e-9), name
            assert term["lowest"] == term["highest"] == term["measured"]
            if term["planned"]:
                assert term["off_by"] == pytest.approx(term["measured"] / term["planned"] - 1, abs=1e-9), name
        exact = terms["saved in a micro-batch"]
        assert exact["planned"] == exact["measured"] == plan["saved_bytes"]
        assert terms["saved at the highest, all in flight"]["measured"] == plan["saved_bytes"] * plan["in_flight"]
        assert exact["off_by"] == terms["saved at the highest, all in flight"]["off_by"] == 0
        chosen = plan["offloaded_bytes"] * micro_batches
        moved = terms["stored on drives in a step"]
        assert moved["planned"] == chosen >= moved["measured"]
        assert terms["share chosen to be offloaded"]["off_by"] == pytest.approx(0, abs=1e-12)
        assert stage["tensors"]["differences"] == []
        assert stage["tensors"]["num_layers"] == plan["layers"]
        assert stage["tensors"]["planned_bytes"] == stage["tensors"]["measured_bytes"] == plan["saved_bytes"]
        planned = sum(each["count"] * group["count"] for group in plan["groups"] for each in group["tensors"])
        assert stage["tensors"]["num_tensors"] == planned
    assert found["step"]["measured"] == pytest.approx(median(lengths), rel=1e-9)
    assert found["step"]["planned"] == report["step"]["seconds"]
    assert found["warnings"] == []
    return found
