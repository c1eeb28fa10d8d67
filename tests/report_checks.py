"""Computes every number of a report again, from the lines of the files alone, and reads them off the page."""

import json
from collections import defaultdict
from html.parser import HTMLParser

import pytest

from ssdtrain_plugin.report.page import shown

DONE = "done"


class Page(HTMLParser):
    """What a page says: numbers by key with value and text, plans, JSON blocks, and all text of the body."""

    def __init__(self, text):
        super().__init__()
        self.numbers, self.plans, self.blocks, self.words, self.links = {}, {}, {}, [], []
        self.labels = []
        self._open = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "br", "link", "img"):
            self._open.append((tag, attributes))
        self.links += [value for name, value in attributes.items() if name in ("src", "href", "xlink:href")]
        if attributes.get("role") == "img":
            self.labels.append(attributes.get("aria-label", ""))

    def handle_startendtag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tags = [tag for tag, _ in self._open]
        if not tags or "svg" in tags or "style" in tags or "head" in tags:
            return
        tag, attributes = self._open[-1]
        if tag == "script":
            self.blocks[attributes["id"]] = json.loads(data)
        elif "data-key" in attributes:
            assert attributes["data-key"] not in self.numbers, "a key twice"
            self.numbers[attributes["data-key"]] = float(attributes["data-value"]), data
        elif "data-plan" in attributes:
            self.plans[attributes["data-plan"]] = data
        else:
            self.words.append((tag, data))


def lines(path):
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def events_of(directory, rank):
    path = directory / f"rank{rank}.trace.jsonl"
    kinds = defaultdict(list)
    for event in lines(path) if path.exists() else []:
        if event["event"] == "start":
            kinds.clear()
        kinds[event["event"]].append(event)
    return kinds


def ranks_of(directory):
    return sorted(int(path.stem.removeprefix("rank")) for path in directory.glob("rank*[0-9].jsonl"))


def expect(directory):
    """Give every number of the page by its key, and the plans."""
    ranks = {rank: lines(directory / f"rank{rank}.jsonl") for rank in ranks_of(directory)}
    every = [step for steps in ranks.values() for step in steps]
    numbers = {
        "total/ranks": len(ranks),
        "total/steps": max(map(len, ranks.values())),
        "total/peak_activation_bytes": max(step["peak_activation_bytes"] for step in every),
        "total/saved_bytes": max(step["saved_bytes"] for step in every),
        "total/num_failures": sum(sum(step["failures"].values()) for step in every),
    }
    for name in ("stored_bytes", "host_bytes", "loaded_bytes", "stall_seconds", "num_loads_on_demand"):
        numbers[f"total/{name}"] = sum(step[name] for step in every)
    plans = {}
    for rank, steps in ranks.items():
        for step in steps:
            for name, value in step.items():
                if name not in ("rank", "plan", "failures", "store_seconds", "load_seconds"):
                    numbers[f"step/{rank}/{step['step']}/{name}"] = value
            for cause, count in step["failures"].items():
                numbers[f"failures/{rank}/{step['step']}/{cause}"] = count
                numbers[f"failures/{rank}/{step['step']}/step"] = step["step"]
        changes = [step for index, step in enumerate(steps) if not index or steps[index - 1]["plan"] != step["plan"]]
        for index, step in enumerate(changes):
            numbers[f"plan/{rank}/{index}/step"] = step["step"]
            plans[f"{rank}/{index}"] = step["plan"]
        kinds = events_of(directory, rank)
        if kinds["step"]:
            numbers |= _of_steps(rank, kinds) | _of_transfers(rank, kinds) | _of_layers(rank, kinds)
    return numbers, plans


def _length(events):
    return sum(event["end"] - event["begin"] for event in events)


def _of_steps(rank, kinds):
    numbers = {}
    for step in kinds["step"]:
        number = step["step"]
        own = {kind: [event for event in kinds[kind] if event["step"] == number] for kind in kinds if kind != "start"}
        row = {
            "step": number,
            "seconds": step["end"] - step["begin"],
            "forward_seconds": _length(event for event in own["pass"] if event["kind"] == "forward"),
            "backward_seconds": _length(event for event in own["pass"] if event["kind"] == "backward"),
            "other_seconds": _length(own.get("instruction", ())),
            "wait_seconds": _length(own.get("wait", ())),
        }
        row["rest_seconds"] = row["seconds"] - row["forward_seconds"] - row["backward_seconds"] - row["other_seconds"]
        numbers |= {f"timed/{rank}/{number}/{name}": value for name, value in row.items()}
    return numbers


def busy_seconds(spans):
    """Length of a union, by sweeping over begins and ends."""
    points = sorted([(begin, -1) for begin, end in spans] + [(end, 1) for begin, end in spans])
    total, depth, since = 0.0, 0, 0.0
    for at, change in points:
        if depth == 0 and change == -1:
            since = at
        depth -= change
        if depth == 0:
            total += at - since
    return total


def _of_transfers(rank, kinds):
    numbers = {}
    for place in {(event["direction"], event["tier"], event["drive"]) for event in kinds["transfer"]}:
        own = [event for event in kinds["transfer"] if (event["direction"], event["tier"], event["drive"]) == place]
        done = [event for event in own if event["outcome"] == DONE]
        nbytes, seconds = (
            sum(event["nbytes"] for event in done),
            busy_seconds([(each["begin"], each["end"]) for each in done]),
        )
        row = {
            "drive": place[2],
            "num_done": len(done),
            "nbytes": nbytes,
            "busy_seconds": seconds,
            "bytes_per_second": nbytes / seconds if seconds else 0.0,
            "queue_seconds": sum(event["begin"] - event["queued"] for event in done) / len(done) if done else 0.0,
            "num_on_demand": sum(event["is_on_demand"] for event in own),
            "num_cancelled": sum(event["outcome"] == "cancelled" for event in own),
            "num_failed": sum(event["outcome"] in ("failed", "given up") for event in own),
        }
        key = "/".join(map(str, place))
        numbers |= {f"transfer/{rank}/{key}/{name}": value for name, value in row.items()}
    return numbers


def layer_of(module):
    if not module:
        return "(outside of named modules)"
    words = module.split(".")
    for index, word in enumerate(words):
        if word.isdecimal():
            return ".".join(words[: index + 1])
    return words[0]


def _of_layers(rank, kinds):
    rows = defaultdict(lambda: defaultdict(int))
    owner = {}
    for save in kinds["save"]:
        owner[save["serial"]] = row = rows[layer_of(save["module"])]
        row["num_saves"] += 1
        row["saved_bytes"] += save["nbytes"]
    for event in kinds["transfer"]:
        if event["serial"] in owner and event["direction"] in ("store", "load"):
            row = owner[event["serial"]]
            row["num_on_demand"] += event["is_on_demand"]
            if event["outcome"] == DONE:
                row[{"store": "stored_bytes", "load": "loaded_bytes"}[event["direction"]]] += event["nbytes"]
    for wait in kinds["wait"]:
        rows[layer_of(wait["module"])]["wait_seconds"] += wait["end"] - wait["begin"]
    names = "num_saves saved_bytes stored_bytes loaded_bytes num_on_demand wait_seconds".split()
    numbers = {f"layer/{rank}/{layer}/{name}": row[name] for layer, row in rows.items() for name in names}
    return numbers | {
        f"layer/{rank}/{layer}/kept_bytes": row["saved_bytes"] - row["stored_bytes"] for layer, row in rows.items()
    }


def expect_memory(directory, rank):
    """Give the points of the memory picture of a rank: seconds since the first recorded step, bytes."""
    starts = {each: events_of(directory, each) for each in ranks_of(directory)}
    origin = min(
        kinds["step"][0]["begin"] - kinds["start"][0]["clock_seconds"] + kinds["start"][0]["wall_seconds"]
        for kinds in starts.values()
        if kinds["step"]
    )
    kinds = starts[rank]
    offset = kinds["start"][0]["wall_seconds"] - kinds["start"][0]["clock_seconds"] - origin
    return [(event["at"] + offset, event) for event in kinds["memory"]]


def check_page(text, directory):
    """Compare every number of a page with the files; return the page."""
    page = Page(text)
    numbers, plans = expect(directory)
    assert page.numbers.keys() == numbers.keys()
    for key, (value, written) in page.numbers.items():
        assert value == pytest.approx(numbers[key], rel=1e-9, abs=1e-9), key
        assert written == shown(key, value), key
    assert page.plans == plans
    stray = [data for tag, data in page.words if tag in ("td", "dd", "dt", "li") and any(map(str.isdigit, data))]
    assert not [data for data in stray if "/" not in data and "left out" not in data], "a number without a key"
    for rank, series in page.blocks["series"]["memory"].items():
        points = expect_memory(directory, int(rank))
        names = ("would_be_bytes", "device_bytes", "host_bytes", "drive_bytes")
        for (x, y), name in zip(series.values(), names, strict=True):
            if len(points) <= 2000:
                assert x == pytest.approx([at for at, _ in points], abs=1e-5)
                assert y == [event[name] for _, event in points]
            assert max(y) == max(event[name] for _, event in points)
    for rank, series in page.blocks["series"]["bandwidth"].items():
        kinds = events_of(directory, int(rank))
        width = (kinds["step"][-1]["end"] - kinds["step"][0]["begin"]) / 240
        for name, (x, y) in series.items():
            direction, tier = name.split()[0], "ssd" if name.endswith("drive") else "host"
            done = [event for event in kinds["transfer"] if event["outcome"] == DONE]
            chosen = [event for event in done if (event["direction"], event["tier"]) == (direction, tier)]
            assert len(x) == len(y) == 240
            # All that lies inside of the recorded steps is in some bin.
            assert sum(y) * width == pytest.approx(sum(event["nbytes"] for event in chosen), rel=0.02)
    return page
