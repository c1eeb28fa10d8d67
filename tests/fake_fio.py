"""A program that answers as fio does, moves nothing, and fails when told."""

import json
import shutil
import sys

# Answers as fio does; what it is told to do wrong, and where it notes its calls, stands in a file beside it.
FAKE = """#!{python} -ESs
import json, os, sys, time
here = os.path.dirname(os.path.abspath(__file__))
orders = json.load(open(os.path.join(here, "orders")))
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("fio-9.9"), sys.exit()
if arguments == ["--enghelp"]:
    print("Available IO engines:\\n\\t" + "\\n\\t".join(orders["engines"])), sys.exit()
with open(os.path.join(here, "calls"), "a") as log:
    names = [argument.partition("=")[2] for argument in arguments if argument.startswith("--filename=")]
    inodes = [os.stat(name).st_ino for name in names]
    call = {{"arguments": arguments, "tunables": os.environ.get("GLIBC_TUNABLES"), "inodes": inodes}}
    print(json.dumps(call), file=log)
number = sum(1 for _ in open(os.path.join(here, "calls")))
if "--ioengine=" + orders.get("refused_engine", "") in arguments or number >= orders.get("fails_from_call", 1 << 30):
    sys.exit("fio: engine not available here")
if orders.get("hangs"):
    time.sleep(600)
jobs = []
for argument in arguments:
    name, _, value = argument.lstrip("-").partition("=")
    if name == "name":
        jobs.append({{"jobname": value, "error": 0, "read": {{"io_bytes": 0, "runtime": 0}},
                     "write": {{"io_bytes": 0, "runtime": 0}}, "usr_cpu": 1.0, "sys_cpu": 1.0, "job_runtime": 10}})
    elif name == "rw":
        direction = "write" if value == "write" else "read"
    elif name == "size":
        jobs[-1][direction] = {{"io_bytes": int(value) - orders.get("loses_bytes", 0), "runtime": 10}}
print(json.dumps({{"fio version": "fio-9.9", "jobs": jobs}}))
"""


class FakeFio:
    """A program that answers as fio does and moves nothing."""

    def __init__(self, folder):
        self._folder = folder
        self.path = folder / "fio"
        self.path.write_text(FAKE.format(python=sys.executable))
        self.path.chmod(0o700)
        self.order()

    def order(self, *, engines=("io_uring", "libaio", "psync"), **orders):
        (self._folder / "orders").write_text(json.dumps({"engines": engines} | orders))

    @property
    def calls(self):
        log = self._folder / "calls"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def install(folder, monkeypatch):
    """Make it the fio of this machine; its program and notes are kept in ``folder``."""
    fake = FakeFio(folder)
    monkeypatch.setattr(shutil, "which", lambda name: str(fake.path))
    return fake
