"""Tables in a terminal."""

from __future__ import annotations

from clients.bench.tables import WIDTH, markdown, sectioned, side_by_side, wrapped


def test_columns_stand_below_each_other() -> None:
    assert markdown(["a", "n"], [["long name", "1"], ["b|c", "23,456"]]).splitlines() == [
        "| a         |      n |",
        "| --------- | -----: |",
        "| long name |      1 |",
        "| b\\|c      | 23,456 |",
    ]


def test_blocks_stand_below_their_titles() -> None:
    assert sectioned(["arm", "mean"], {"loss": [["off", "1.0"]]}).splitlines()[2:] == [
        "| **loss** |      |",
        "| off      |  1.0 |",
    ]


def test_wide_table_becomes_several_with_all_columns() -> None:
    files = [f"file number {n} with a long name" for n in range(5)]
    text = side_by_side(["load", *files], [["requests", *map(str, range(5))]])
    tables = text.split("\n\n")
    assert len(tables) == 3
    assert all(len(line) <= WIDTH for line in text.splitlines())
    assert [name for table in tables for name in files if name in table] == files
    assert [table.splitlines()[2].split()[1] for table in tables] == ["requests"] * 3


def test_paragraph_is_wrapped_between_words() -> None:
    text = wrapped("- " + "word-word " * 30 + "x" * 120, "  ")
    lines = text.splitlines()
    assert all(len(line) <= WIDTH for line in lines[:-1])
    assert lines[-1] == "  " + "x" * 120
    assert all(line.startswith("  word-word") for line in lines[1:-1])
