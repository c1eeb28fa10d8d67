"""The parts of megatron-core one by one with the plugin active: schedules, blocks, checkpoint, experts, parameters.

The checks themselves are in ``megatron_checks_*.py`` and run in processes of their own, each interpreter's in one job.
"""

import ast
import json
from pathlib import Path

import pytest
from megatron_launches import Launches, asked_for, each_release, start

pytest.importorskip("megatron.core")
pytestmark = [pytest.mark.megatron, pytest.mark.slow, pytest.mark.timeout(500)]

HERE = Path(__file__).parent
# Modules with checks, by the number of ranks that they need. All that need as many share a job.
MODULES = {
    1: ["megatron_checks_schedules", "megatron_checks_blocks", "megatron_checks_parts"],
    2: ["megatron_checks_stages"],
}


def _checks(module):
    """Read the names of a module's checks; Megatron is imported in the ranks only."""
    tree = ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """Give what each rank said of the checks for so many ranks."""

    def launch(release, num_ranks):
        directory = tmp_path_factory.mktemp("checks")
        arguments = [",".join(MODULES[num_ranks]), directory]
        start(release, HERE / "megatron_blocks_worker.py", arguments, directory, num_ranks)
        return [json.loads(path.read_text()) for path in sorted(directory.glob("rank*.json"))]

    launches = Launches(launch, {release for (release,) in asked_for(request, "release")}, {1: 1, 2: 2})
    yield launches
    launches.close()


@pytest.mark.parametrize(
    ("num_ranks", "module", "check"),
    [(number, module, check) for number, modules in MODULES.items() for module in modules for check in _checks(module)],
)
@each_release
def test_megatron(results, release, num_ranks, module, check):
    for rank in results(release, num_ranks):
        said = rank[f"{module}.{check}"]
        if "skipped" in said:
            pytest.skip(said["skipped"])
        assert "failed" not in said, said["failed"]
