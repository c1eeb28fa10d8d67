"""Jobs on every release of megatron-core here, each launched when the first test asks for it, once."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import EAGER, MEGATRON, fork_ranks

NEWEST = os.environ.get("SSDTRAIN_MEGATRON_PYTHON")
RELEASES = {"this": sys.executable, "newest": NEWEST}
needs_newest = pytest.mark.skipif(not NEWEST, reason="SSDTRAIN_MEGATRON_PYTHON is not set")
each_release = pytest.mark.parametrize("release", ["this", pytest.param("newest", marks=needs_newest)])


class Launches:
    """The jobs of a test file. Those of one rank run side by side on all releases: each has a core of its own.

    Args:
        launch: Called with a release and the name of a job; returns what tests look at.
        releases: That tests will ask for.
        num_ranks: Of each job, by its name.
    """

    def __init__(self, launch, releases, num_ranks):
        self._launch, self._releases, self._num_ranks = launch, releases, num_ranks
        self._pool, self._found = ThreadPoolExecutor(len(RELEASES)), {}

    def __call__(self, release, name):
        """Wait for a job; raise its error, also for the second test that asks."""
        for each in self._releases if self._num_ranks[name] == 1 else [release]:
            if (each, name) not in self._found:
                self._found[each, name] = self._pool.submit(self._launch, each, name)
        return self._found[release, name].result()

    def close(self):
        self._pool.shutdown(cancel_futures=True)


def start(release, worker, arguments, directory, num_ranks):
    """Run a worker as all ranks of a job on a release; compile nothing where more than one rank would."""
    options = {"python": RELEASES[release], "num_ranks": num_ranks, "imports": MEGATRON}
    options |= EAGER if num_ranks > 1 else {}
    return fork_ranks(worker, arguments, directory, timeout_seconds=400, **options)


def asked_for(request, *names):
    """List the values of some parameters, of all tests of this file that will run.

    Args:
        request: Of a fixture.
        names: Of parameters.
    """
    params = [item.callspec.params for item in request.session.items if item.path == request.path]
    return [tuple(each[name] for name in names) for each in params if set(names) <= set(each)]
