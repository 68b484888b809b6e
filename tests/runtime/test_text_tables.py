"""Tables of strings."""

from moe_bsr.runtime.text_tables import as_markdown, as_text

ROWS = [["task", "top-1"], ["a", "9.5"], ["longer", "100.0"]]


def test_columns_are_aligned():
    assert as_text(ROWS).splitlines() == ["task    top-1", "a         9.5", "longer  100.0"]
    assert as_text([["a", ""], ["b", "  "]]) == "a\nb"


def test_markdown_has_a_rule_under_the_header():
    assert as_markdown(ROWS).splitlines() == ["| task | top-1 |", "| --- | --- |", "| a | 9.5 |", "| longer | 100.0 |"]


def test_control_characters_are_escaped_and_columns_stay_aligned():
    rows = [["task", "n"], ["日本", "1"], ["a\x1b[2J\n", "2"], ["a|b", "3"]]
    assert as_text(rows).splitlines() == ["task        n", "日本        1", r"a\x1b[2J\n  2", "a|b         3"]
    assert as_markdown(rows).splitlines()[-1] == r"| a\|b | 3 |"
