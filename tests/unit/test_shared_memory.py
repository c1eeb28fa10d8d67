"""The tests give back what DeepSpeed leaves in shared memory, and only that."""

import subprocess
import sys
import uuid
from pathlib import Path

from shared_memory import buffers, give_back

_HOLD = """
import mmap, sys
with open(sys.argv[1], "wb+") as file:
    file.write(bytes(4096))
    file.flush()
    memory = mmap.mmap(file.fileno(), 4096)
print("up", flush=True)
sys.stdin.read()
"""


def test_a_buffer_stays_while_a_process_has_it_and_goes_with_the_process():
    """A rank that looks for the buffer of its neighbour, which another session has removed, does so for ever."""
    foreign, path = buffers(), Path(f"/dev/shm/deepspeed_allreduce_buffer_{uuid.uuid4().hex}")
    command = [sys.executable, "-c", _HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        give_back(foreign)
        assert path.exists()
        process.stdin.close()
    give_back(foreign)
    assert not path.exists()
