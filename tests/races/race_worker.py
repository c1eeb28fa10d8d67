"""Runs seeds of the race suite; a line of JSON each: ``race_worker.py FIRST COUNT [STEP]``."""

import json
import sys

from race_run import prepare_process, race
from race_scheduler import Threads


def main():
    numbers = [int(text) for text in sys.argv[1:]]
    first, count = numbers[:2]
    step = numbers[2] if len(numbers) > 2 else 1
    prepare_process()
    threads = Threads()
    for index in range(count):
        report = race(first + index * step, threads)
        line = {"seed": report.seed, "failure": report.failure, "digest": report.digest, "seen": report.seen}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
