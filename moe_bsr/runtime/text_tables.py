"""Format tables of strings for a terminal or as Markdown. The first row is the header.

Cells may hold names that users chose. They pass through `names.printable`, so they cannot control the terminal.
"""

from collections.abc import Sequence

from moe_bsr.runtime.names import columns, pad, printable


def as_text(rows: Sequence[Sequence[str]], right: bool = True) -> str:
    """Pad columns to equal width. The first is aligned to the left, the others to the right, or all to the left."""
    shown = [list(map(printable, row)) for row in rows]
    widths = [max(map(columns, column)) for column in zip(*shown, strict=True)]
    return "\n".join(
        "  ".join(
            pad(cell, width, right=right and i > 0) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in shown
    )


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(printable(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([head, "| " + " | ".join("---" for _ in rows[0]) + " |", *body])
