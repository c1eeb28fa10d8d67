"""A host is prepared when it is really imported, whoever asked for it before."""

import importlib
import importlib.util
import sys

import pytest

from ssdtrain_plugin.run import _AfterImport

NAME = "host_that_is_imported_late"


@pytest.fixture
def host(tmp_path, monkeypatch):
    file = tmp_path / f"{NAME}.py"
    file.write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield file
    sys.modules.pop(NAME, None)


@pytest.fixture
def prepared(host, monkeypatch):
    modules = []
    finder = _AfterImport({NAME: modules.append})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    return modules


def test_the_action_gets_the_module_after_it_has_run(prepared):
    module = importlib.import_module(NAME)
    assert prepared == [module]
    assert module.value == 1


@pytest.mark.parametrize("num_questions", [1, 3])
def test_who_only_asks_whether_there_is_such_a_module_does_not_use_the_action_up(prepared, num_questions):
    for _ in range(num_questions):
        assert importlib.util.find_spec(NAME) is not None
    assert prepared == []
    assert importlib.import_module(NAME) is prepared[0]


def test_an_import_that_fails_leaves_the_action_for_the_next_one(prepared, host):
    host.write_text("raise ValueError('broken')\n")
    with pytest.raises(ValueError, match="broken"):
        importlib.import_module(NAME)
    host.write_text("value = 'repaired'\n")
    importlib.invalidate_caches()
    assert importlib.import_module(NAME).value == "repaired"
    assert len(prepared) == 1


def test_a_module_that_is_not_there_is_missed_as_without_us(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [_AfterImport({"there_is_no_such_host": print}), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_host"):
        importlib.import_module("there_is_no_such_host")
