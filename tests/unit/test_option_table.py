"""The option table of the user guide is the config's, word for word."""

import option_table
import pytest

from ssdtrain_plugin.config import OffloadConfig


def test_the_user_guide_is_up_to_date():
    text = option_table.GUIDE.read_text(encoding="utf-8")
    assert option_table.insert_table(text) == text, "docs/user_guide.md is stale: run `make docs`"


def test_every_option_has_a_row():
    table = option_table.render_table()
    for name, field in OffloadConfig.model_fields.items():
        assert f"| `{name}` |" in table
        assert field.description in table


def test_no_description_breaks_the_table():
    for line in option_table.render_table().splitlines():
        assert line.count("|") == 5, line


def test_a_guide_without_markers_is_refused():
    with pytest.raises(ValueError, match="has no"):
        option_table.insert_table("no markers here")
