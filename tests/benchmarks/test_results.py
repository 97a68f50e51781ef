"""Result files: reading returns the written value, a row stands on one line, and no file is half written."""

import json
import math

import pytest

from benchmarks.common.results import FOLDER, RESEARCH, read_result, write_result, write_rows

ROWS = [{"arm": name, "batch": batch, "ms": 1 / 3 * batch} for name in ("a", "\u03b2") for batch in (1, 16)]


def lines_of(path):
    return [line.strip().rstrip(",") for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        [],
        {},
        [[1, 2], [3, 4]],
        {"models": [{"measured": {"lit": [0.1] * 600, "x": [1e-300] * 600}, "rejected": False}], "count": 2},
        [{"terms": [0.1] * 1000, "none": None, "text": '"quoted"\n'}],
    ],
)
def test_reading_returns_the_written_value(rows, tmp_path):
    path = write_result("name", rows, folder=tmp_path, goals=[{"met": True}], left_out=[])
    found = read_result("name", tmp_path)
    assert path == tmp_path / "name.json"
    assert (found["rows"], found["goals"], found["left_out"]) == (rows, [{"met": True}], [])
    assert list(found) == ["environment", "goals", "left_out", "rows"]


def test_keys_become_strings_and_tuples_lists(tmp_path):
    write_rows(tmp_path / "a.json", {"windows": {0: 2, 100: 8}, "rows": [{"shape": (1, 2)}]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"windows": {"0": 2, "100": 8}, "rows": [{"shape": [1, 2]}]}


def test_nan_and_infinity_are_kept(tmp_path):
    write_rows(tmp_path / "a.json", {"rows": [{"nan": math.nan, "low": -math.inf, "high": math.inf}]})
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert math.isnan(row["nan"])
    assert (row["low"], row["high"]) == (-math.inf, math.inf)


def test_a_row_is_a_line(tmp_path):
    long = {"name": "long", "tests": ROWS, "measured": {"x": [0.5] * 500}}
    write_rows(tmp_path / "a.json", {"environment": {"gpu": None}, "rows": [*ROWS, long]})
    lines = lines_of(tmp_path / "a.json")
    for line in [*(json.dumps(row) for row in ROWS), '"environment": {"gpu": null}', '"name": "long"']:
        assert line in lines
    assert sum(line == json.dumps(ROWS[0]) for line in lines) == 2  # once among the rows, once inside the long row
    assert f'"measured": {json.dumps(long["measured"])}' not in lines
    assert f'"x": {json.dumps(long["measured"]["x"])}' in lines


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_rows(path, {"rows": ROWS})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_rows(path, {"rows": [*ROWS, {"bad": object()}]})
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("path", [*FOLDER.glob("*.json"), *RESEARCH.glob("*.json")], ids=lambda path: path.stem)
def test_committed_files_are_as_they_would_be_written(path, tmp_path):
    write_rows(tmp_path / "a.json", json.loads(path.read_text(encoding="utf-8")))
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == path.read_text(encoding="utf-8")
