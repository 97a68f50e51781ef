"""Tables for Markdown pages, where a table stands between <!-- table NAME --> and <!-- end -->."""

import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.common.results import Row
from ddpm_fast.files import whole_file


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Replace tables of a page, whole or not at all; see `filled`."""
    text = filled(page.read_text(encoding="utf-8"), tables, page.name)
    with whole_file(page) as part:
        part.write_text(text, encoding="utf-8")


def filled(text: str, tables: Mapping[str, str], page: str) -> str:
    """Return the text of a page with its tables replaced.

    Args:
        text: The text of the page.
        tables: The new tables by name.
        page: The name of the page, for the error.

    Raises:
        ValueError: The page does not have each of the tables exactly once.
    """
    for name, table in tables.items():
        mark = f"<!-- table {name} -->\n"
        new = f"{mark}{table}\n".replace("\\", r"\\")
        text, count = re.subn(f"{mark}.*?(?=<!-- end -->)", new, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{page} must have the table {name!r} once, found it {count} times")
    return text


def markdown_table(header: str, lines: list[str]) -> str:
    """Return a Markdown table."""
    return "\n".join([header, "|---" * (header.count("|") - 1) + "|", *lines])


def cell(row: Row | None, key: str, form: str) -> str:
    """Return a number of a row as a cell of a table.

    A number that was not measured is a dash. A row with an error gives "wrong" or "failed".
    """
    if row is not None and "error" in row:
        return "wrong" if row["error"].startswith("wrong result") else "failed"
    value = None if row is None else row.get(key)
    return "-" if value is None else format(value, form)


def with_range(value: float, low: float, high: float) -> str:
    """Return a number with its range as a cell of a table: 1.50 (1.40 to 1.60)."""
    return f"{value:.2f} ({low:.2f} to {high:.2f})"
