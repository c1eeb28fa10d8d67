"""What could run code from a file, or leave a file to others, stands nowhere: proved on the syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("ssdtrain_plugin", "launch", "tools") for path in (ROOT / folder).rglob("*.py"))

# What reads code from data, or runs text.
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
FORBIDDEN_NAMES = {"eval", "exec", "compile"}
FORBIDDEN_CALLS = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.package", "numpy.load", "np.load", "os.system", "os.popen"),
    *("tempfile.mktemp", "multiprocessing.connection"),
}
# The comparison with the usual recipe of saving tensors one by one does as that recipe does, without running code.
EXCEPTIONS = {"ssdtrain_plugin/bench/peers.py": {"torch.save", "torch.load"}}
# SafeLoader makes plain values only, and so does what is derived from it; nodes are not values yet.
SAFE_YAML = {
    *("yaml.safe_load", "yaml.safe_dump", "yaml.YAMLError", "yaml.MarkedYAMLError"),
    *("yaml.SafeLoader", "yaml.Node", "yaml.ScalarNode", "yaml.MappingNode"),
}


def _dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults_of(tree):
    """List what is forbidden in a tree, with its line."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [_dotted(node)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_NAMES:
            yield node.lineno, node.func.id
        elif isinstance(node, ast.keyword) and node.arg == "shell" and getattr(node.value, "value", True):
            yield node.value.lineno, "shell=True"
        for name in names:
            is_yaml = name.startswith("yaml.") and name not in SAFE_YAML
            if is_yaml or name.partition(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_CALLS:
                yield node.lineno, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_here_runs_what_a_file_says(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    allowed = EXCEPTIONS.get(str(path.relative_to(ROOT)), set())
    faults = [(line, name) for line, name in faults_of(tree) if name not in allowed]
    assert not faults, faults
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _dotted(node.func) == "torch.load":
            assert any(word.arg == "weights_only" and word.value.value is True for word in node.keywords), node.lineno


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import yaml\nyaml.load(text, Loader=yaml.FullLoader)",
        "from yaml import unsafe_load",
        "eval(text)",
        "subprocess.run(command, shell=True)",
        "def f():\n    import marshal",
    ],
)
def test_the_walk_sees_what_it_must_see(line):
    assert list(faults_of(ast.parse(line)))


def test_the_walk_allows_what_is_safe():
    assert not list(faults_of(ast.parse("import yaml\nyaml.safe_load(text)\nmodel.eval()\nsubprocess.run(command)")))
