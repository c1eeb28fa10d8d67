"""One rank of a job that trains under faults: ``fault_worker.py REQUEST`` appends to ``<results>/rank<N>.jsonl``.

Each case is a run of its own. What happened is written at once, because a rank may end at any moment.
"""

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path

import torch
from fault_cases import ALL_CASES, END_STEP, NUM_STEPS, PLAIN
from fault_hosts import PipelineHost, PlainHost, block_of, make_fault, wait_for_hung


class Messages(logging.Handler):
    """Keeps what users would read."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def open_extents(drive):
    names = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            names.append(os.readlink(link))
        except OSError:  # the descriptor that lists the directory
            continue
    return [name for name in names if name.startswith(drive) and name.endswith(" (deleted)")]


def leftovers(request):
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("ssdtrain-")]
    files = [str(path) for path in Path(request["drive"]).rglob("*") if path.is_file()]
    return threads + files + open_extents(request["drive"])


class Worker:
    def __init__(self, request):
        self.request = request
        self.rank = int(os.environ.get("RANK", "0"))
        self.host = PlainHost if request["host"] == PLAIN else PipelineHost
        self.file = (Path(request["results"]) / f"rank{self.rank}.jsonl").open("a")
        self.expected = self.reference()

    def tell(self, event, **values):
        self.file.write(json.dumps({"event": event, "at": time.monotonic(), **values}) + "\n")
        self.file.flush()

    def reference(self):
        host = self.host()
        digests = [host.step() for _ in range(NUM_STEPS)]
        host.close()
        assert len(set(digests)) == NUM_STEPS, "nothing was trained"
        return digests

    def run(self, case):
        self.tell("begin", case=case.name)
        messages = Messages()
        logging.getLogger("ssdtrain_plugin").addHandler(messages)
        fault = make_fault(case, self.rank, lambda: self.tell("fault", case=case.name), self.request)
        block = block_of(case, self.request)
        host = self.host(block, fault)
        failures, moved = {}, []
        for number in range(NUM_STEPS):
            if number == case.first_step:
                fault.begin()
            if number == END_STEP:
                fault.end()
                wait_for_hung(host.offloader)
            digest = host.step()
            for cause, count in host.last.failures.items():
                failures[cause] = failures.get(cause, 0) + count
            moved.append([host.last.stored_bytes, host.last.loaded_bytes])
            self.tell("step", case=case.name, number=number, is_equal=digest == self.expected[number])
        host.close()
        self.tell(
            "end",
            case=case.name,
            num_injected=fault.num_injected,
            failures=failures,
            moved=moved,
            messages=messages.texts,
            leftovers=leftovers(self.request),
        )
        logging.getLogger("ssdtrain_plugin").removeHandler(messages)


def main():
    request = json.loads(Path(sys.argv[-1]).read_text())
    torch.set_num_threads(1)
    if request["host"] != PLAIN:
        import deepspeed

        deepspeed.init_distributed()
    worker = Worker(request)
    cases = {case.name: case for case in ALL_CASES}
    for name in request["cases"]:
        worker.run(cases[name])
    worker.tell("done")
    if request["host"] != PLAIN:
        deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
