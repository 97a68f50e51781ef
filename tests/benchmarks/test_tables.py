"""Tables in pages: a table replaces the old text between its marks, and a page without its marks is refused."""

import pytest

from benchmarks.common import pages
from benchmarks.common.pages import cell, markdown_table, with_range

PAGE = "above\n<!-- table a -->\n{a}<!-- end -->\nbetween\n<!-- table b -->\nold\nlines\n<!-- end -->\nbelow\n"


@pytest.mark.parametrize("old", ["", "old\n", "| old |\n|---|\n"])
def test_only_the_text_between_marks_changes(old):
    expected = PAGE.format(a="new \\1\n").replace("old\nlines", "newer")
    assert pages.filled(PAGE.format(a=old), {"a": "new \\1", "b": "newer"}, "page.md") == expected


@pytest.mark.parametrize(("text", "count"), [("nothing", 0), (2 * PAGE.format(a=""), 2)])
def test_a_table_must_be_there_once(text, count):
    with pytest.raises(ValueError, match=rf"page.md must have the table 'a' once, found it {count} times"):
        pages.filled(text, {"a": "new"}, "page.md")


def test_a_table_of_cells():
    row = {"ms": 1234.5, "missing": None}
    assert [cell(row, "ms", ",.1f"), cell(row, "missing", ".1f"), cell(None, "ms", ".1f")] == ["1,234.5", "-", "-"]
    assert cell({"error": "wrong result: off"}, "ms", ".1f") == "wrong"
    assert cell({"error": "RuntimeError: no"}, "ms", ".1f") == "failed"
    assert with_range(1.5, 1.4, 1.625) == "1.50 (1.40 to 1.62)"
    assert markdown_table("| a | b |", ["| 1 | 2 |"]) == "| a | b |\n|---|---|\n| 1 | 2 |"
