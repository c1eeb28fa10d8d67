"""The shape of the house, proved on the syntax trees: who may import whom, and what stands only in one place."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

PACKAGE = "ssdtrain_plugin"
ROOT = Path(__file__).parents[2] / PACKAGE
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 70

# An import points to an earlier line only. A name stands for the module or for the whole folder.
LAYERS = [
    ["errors", "frames", "units", "version"],
    ["documents"],
    ["config", "deadlines", "identity", "streams", "stats", "account", "events"],
    ["profile", "planner", "projection", "trace"],
    ["storage", "policy", "schedule", "summary"],
    ["transfer", "failures", "preflight"],
    ["records", "ledger", "placement", "observing"],
    ["table"],
    ["reload", "migration"],
    ["cache"],
    ["hooks", "tracing"],
    ["runtime"],
    [""],  # ssdtrain_plugin itself: the public names
    ["integrations", "doctor", "bench", "report"],
    ["cli_errors"],
    ["cli_bench", "cli_plan", "cli_report"],
    ["run", "cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


@dataclass(frozen=True)
class Module:
    """One file: its name inside the package, for example ``storage.base``, and its tree."""

    name: str
    path: Path

    @property
    def part(self) -> str:
        """The name that stands in ``LAYERS``."""
        return self.name.partition(".")[0]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"), filename=str(self.path))


def _name_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = [Module(_name_of(path), path) for path in sorted(ROOT.rglob("*.py"))]
NAMES = {module.name for module in MODULES}
every_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name or "__init__")


def imports_of(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported name in full, ``from a import b`` as ``a.b``, with its line; at any depth of the tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and _dotted(node.func).endswith(("import_module", "__import__")):
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield target.value, node.lineno


def own_imports_of(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Modules of this package that are imported, by their names inside it."""
    for name, line in imports_of(tree):
        if name != PACKAGE and not name.startswith(f"{PACKAGE}."):
            continue
        inside = name.removeprefix(PACKAGE).removeprefix(".")
        yield (inside if inside in NAMES else inside.rpartition(".")[0]), line


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def names_used(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported name and every dotted expression, such as ``torch.cuda.Stream``."""
    yield from imports_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield _dotted(node), node.lineno


def starts_with(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


# --- who may import whom


@every_module
def test_a_module_has_a_place_in_the_layers(module):
    assert module.part in LEVEL, f"give `{module.part}` a line in LAYERS and in docs/design.md"


@every_module
def test_imports_point_down(module):
    wrong = [
        f"line {line}: {module.name or PACKAGE} imports {other or PACKAGE}"
        for other, line in own_imports_of(module.tree)
        if other.partition(".")[0] != module.part and LEVEL[other.partition(".")[0]] >= LEVEL[module.part]
    ]
    assert not wrong, "\n".join(wrong)


@every_module
def test_concrete_tiers_and_policies_are_named_where_objects_are_built(module):
    may_name = {"runtime", "preflight", "doctor", "bench", "storage", "policy"}
    wrong = [
        f"line {line}: {module.name} imports {other}"
        for other, line in own_imports_of(module.tree)
        if starts_with(other, "storage") or starts_with(other, "policy")
        if other not in {"storage", "storage.base", "policy", "policy.base"} and module.part not in may_name
    ]
    assert not wrong, "\n".join(wrong)


@every_module
def test_imports_are_absolute_and_named(module):
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert "*" not in {alias.name for alias in node.names}, f"line {node.lineno}: star import"


# --- what stands in one place only


CONFINED = [
    # what, where it may stand, exceptions that are always allowed
    ("deepspeed", ("integrations", "run"), "deepspeed.ops"),
    ("deepspeed.ops", ("storage.aio",), None),
    ("megatron", ("integrations", "run"), None),
    ("hjson", ("integrations", "run"), None),
    ("kvikio", ("storage.gds",), None),
    ("torch.cuda.Stream", ("streams",), None),
    ("torch.cuda.Event", ("streams",), None),
    ("threading", ("transfer", "cache", "hooks", "storage", "bench", "doctor"), None),
    ("concurrent.futures", ("transfer", "cache", "storage", "bench", "doctor"), None),
]


@pytest.mark.parametrize(("what", "places", "other_rule"), CONFINED, ids=[row[0] for row in CONFINED])
def test_this_is_used_in_its_place_only(what, places, other_rule):
    wrong = [
        f"{module.path.name}:{line}: {name}"
        for module in MODULES
        if not any(starts_with(module.name, place) for place in places)
        for name, line in names_used(module.tree)
        if starts_with(name, what) and not (other_rule and starts_with(name, other_rule))
    ]
    assert not wrong, "\n".join(wrong)


# --- what stands nowhere


@every_module
def test_no_assert_statement(module):
    lines = [node.lineno for node in ast.walk(module.tree) if isinstance(node, ast.Assert)]
    assert not lines, f"assert on lines {lines}: it vanishes under -O; raise an error of errors.py"


@every_module
def test_no_broad_except_but_at_a_threads_top(module):
    if module.name == "transfer":
        return
    broad = {"Exception", "BaseException"}
    wrong = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or _dotted(kind) in broad for kind in kinds):
                wrong.append(node.lineno)
    assert not wrong, f"broad except on lines {wrong}"


@every_module
def test_no_module_is_a_drawer(module):
    assert not {"utils", "helpers", "misc", "common"} & set(module.name.split("."))


# --- sizes


@every_module
def test_a_file_fits_in_the_head(module):
    lines = len(module.path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines; split by concept"


@every_module
def test_a_function_fits_on_a_page(module):
    wrong = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not wrong, "\n".join(wrong)


# --- packages


PACKAGES = [module for module in MODULES if module.path.name == "__init__.py"]


@pytest.mark.parametrize("module", PACKAGES, ids=lambda module: module.name or "__init__")
def test_a_package_file_names_things_and_does_nothing(module):
    for node in module.tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_all = isinstance(node, ast.Assign) and [_dotted(target) for target in node.targets] == ["__all__"]
        assert is_docstring or is_all or isinstance(node, ast.Import | ast.ImportFrom), f"line {node.lineno}: logic"


def test_every_folder_with_modules_is_a_package():
    for folder in {path.parent for path in ROOT.rglob("*.py")}:
        assert (folder / "__init__.py").is_file(), folder


# --- the rules above see what they must see


def test_the_walk_sees_imports_at_any_depth_and_in_any_form():
    source = "import a.b\ndef f():\n    from c import d\n    import importlib\n    importlib.import_module('e.f')\n"
    assert {name for name, _ in imports_of(ast.parse(source))} == {"a.b", "c.d", "importlib", "e.f"}


def test_the_walk_sees_dotted_names():
    used = {name for name, _ in names_used(ast.parse("x: torch.cuda.Stream = torch.cuda.Stream(0)"))}
    assert "torch.cuda.Stream" in used


def test_an_own_import_is_resolved_to_its_module():
    source = f"from {PACKAGE} import errors\nfrom {PACKAGE}.storage.base import Tier\nimport {PACKAGE}\n"
    assert [name for name, _ in own_imports_of(ast.parse(source))] == ["errors", "storage.base", ""]
