"""The exception tree: one base, numbers as attributes, a hint at the end."""

import errno
import pickle
import re
from pathlib import Path

import pytest

from ssdtrain_plugin import errors
from ssdtrain_plugin.errors import CapacityError, ConfigError, LoadError, OffloadError, StorageError, StoreError


@pytest.mark.parametrize("name", errors.__all__)
def test_one_except_clause_catches_them_all(name):
    assert issubclass(getattr(errors, name), OffloadError)
    assert issubclass(getattr(errors, name), RuntimeError)


def test_every_exception_of_the_module_is_public():
    found = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert sorted(found) == sorted(errors.__all__)


@pytest.mark.parametrize("kind", [StoreError, LoadError, CapacityError])
def test_tier_failures_are_storage_errors(kind):
    assert issubclass(kind, StorageError)


def test_a_hint_stands_at_the_end_on_a_line_of_its_own():
    error = OffloadError("cannot do it: `x` (1, expected 2)", hint="try again")
    assert str(error) == "cannot do it: `x` (1, expected 2)\n\nhint: try again"
    assert (error.message, error.hint) == ("cannot do it: `x` (1, expected 2)", "try again")


def test_without_a_hint_the_message_stands_alone():
    assert str(OffloadError("broken")) == "broken"


def test_a_storage_error_keeps_its_numbers():
    error = StoreError("cannot store", errno=errno.ENOSPC, path="/mnt/x", offset=4096, nbytes=512, hint="free space")
    assert (error.errno, error.path, error.offset, error.nbytes) == (errno.ENOSPC, "/mnt/x", 4096, 512)


def test_a_storage_error_may_know_nothing():
    error = LoadError("cannot load")
    assert (error.errno, error.path, error.offset, error.nbytes) == (None, None, None, None)


def test_a_config_error_lists_every_fault():
    error = ConfigError("`ds.json`", ["paths: missing", "policy: 3 (expected text)"], hint="see the guide")
    assert str(error) == (
        "2 problems in `ds.json`:\n  paths: missing\n  policy: 3 (expected text)\n\nhint: see the guide"
    )
    assert error.problems == ("paths: missing", "policy: 3 (expected text)")
    assert error.source == "`ds.json`"


def test_one_fault_is_counted_in_the_singular():
    assert str(ConfigError("`x`", ["a: b"])).startswith("1 problem in `x`:")


def test_a_config_error_is_also_a_value_error():
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    "error",
    [
        OffloadError("m", hint="h"),
        ConfigError("`x`", ["a: b", "c: d"], hint="h"),
        StoreError("m", errno=28, path="/p", offset=1, nbytes=2, hint="h"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_survives_the_way_from_another_process(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_the_troubleshooting_page_quotes_messages_that_exist():
    root = Path(errors.__file__).parent
    # Neighbouring string literals are one message: take out what stands between them.
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in root.rglob("*.py")))
    page = (root.parent / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`$", page, flags=re.MULTILINE)
    assert quoted
    missing = [text for text in quoted if text not in source]
    assert not missing, missing
