"""The parts of megatron-core one by one with the plugin active: schedules, blocks, checkpoint, experts, parameters.

The checks themselves are in ``megatron_checks_*.py`` and run in processes of their own, each interpreter's in one job.
"""

import ast
import json
from pathlib import Path

import pytest
from processes import EAGER, MEGATRON, fork_ranks
from test_megatron import PYTHONS

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


@pytest.fixture(scope="module", params=PYTHONS)
def results(request, tmp_path_factory):
    """Run the checks for so many ranks when the first test asks for them; give what each rank said."""
    found = {}

    def get(num_ranks):
        if num_ranks not in found:
            found[num_ranks] = None  # a job that fails is not launched again by every test of it
            directory = tmp_path_factory.mktemp("checks")
            arguments = [",".join(MODULES[num_ranks]), directory]
            options = {"python": request.param, "num_ranks": num_ranks, "imports": MEGATRON}
            options |= EAGER if num_ranks > 1 else {}
            fork_ranks(HERE / "megatron_blocks_worker.py", arguments, directory, timeout_seconds=400, **options)
            found[num_ranks] = [json.loads(path.read_text()) for path in sorted(directory.glob("rank*.json"))]
        assert found[num_ranks] is not None, "the job failed before"
        return found[num_ranks]

    return get


@pytest.mark.parametrize(
    ("num_ranks", "module", "check"),
    [(number, module, check) for number, modules in MODULES.items() for module in modules for check in _checks(module)],
)
def test_megatron(results, num_ranks, module, check):
    for rank in results(num_ranks):
        said = rank[f"{module}.{check}"]
        if "skipped" in said:
            pytest.skip(said["skipped"])
        assert "failed" not in said, said["failed"]
