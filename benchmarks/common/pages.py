"""Tables in Markdown pages: a table stands between <!-- table NAME --> and <!-- end -->."""

import re
from collections.abc import Mapping


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
