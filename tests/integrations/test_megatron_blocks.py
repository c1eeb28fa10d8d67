"""The parts of megatron-core one by one with the plugin active: schedules, blocks, checkpoint, experts, parameters.

The checks themselves are in ``megatron_checks_*.py`` and run in processes of their own, each interpreter's in one job.
"""

import ast
import json
from pathlib import Path

import pytest
from processes import run_ranks
from test_megatron import PYTHONS

pytest.importorskip("megatron.core")
pytestmark = [pytest.mark.megatron, pytest.mark.slow, pytest.mark.timeout(500)]

HERE = Path(__file__).parent
NUM_RANKS = {
    "megatron_checks_schedules": 1,
    "megatron_checks_blocks": 1,
    "megatron_checks_parts": 1,
    "megatron_checks_stages": 2,
}


def _checks(module):
    """Read the names of a module's checks; Megatron is imported in the ranks only."""
    tree = ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")]


@pytest.fixture(scope="module", params=PYTHONS)
def results(request, tmp_path_factory):
    """Run the checks of a module when the first test asks for them; give what each rank said."""
    found = {}

    def get(module):
        if module not in found:
            directory = tmp_path_factory.mktemp(module)
            command = [request.param, HERE / "megatron_blocks_worker.py", module, directory]
            run_ranks(command, directory, num_ranks=NUM_RANKS[module], timeout_seconds=400)
            found[module] = [json.loads(path.read_text()) for path in sorted(directory.glob("rank*.json"))]
        return found[module]

    return get


@pytest.mark.parametrize(
    ("module", "check"), [(module, check) for module in NUM_RANKS for check in _checks(module)], ids=lambda name: name
)
def test_megatron(results, module, check):
    for rank in results(module):
        said = rank[check]
        if "skipped" in said:
            pytest.skip(said["skipped"])
        assert "failed" not in said, said["failed"]
