"""Tables of strings."""

from moe_bsr.runtime.text_tables import as_markdown, as_text

ROWS = [["task", "top-1"], ["a", "9.5"], ["longer", "100.0"]]


def test_columns_are_aligned():
    assert as_text(ROWS).splitlines() == ["task    top-1", "a         9.5", "longer  100.0"]
    assert as_text([["a", ""], ["b", "  "]]) == "a\nb"


def test_markdown_has_a_rule_under_the_header():
    assert as_markdown(ROWS).splitlines() == ["| task | top-1 |", "| --- | --- |", "| a | 9.5 |", "| longer | 100.0 |"]
