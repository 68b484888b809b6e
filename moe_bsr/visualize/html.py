"""Write one HTML page that needs no server and no other file: pictures are inline, and numbers are tables."""

import base64
from dataclasses import dataclass, field
from html import escape as escape_markup

from moe_bsr.runtime.names import printable
from moe_bsr.visualize.conclusions import Claim

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1a1a1a; font: 16px/1.55 "DejaVu Sans", Verdana, sans-serif; }
main, header { max-width: 1000px; margin: 0 auto; padding: 0 24px; box-sizing: content-box; }
header { padding-top: 40px; }
h1 { font-size: 28px; margin: 0 0 4px; }
h2 { font-size: 21px; margin: 56px 0 8px; padding-top: 16px; border-top: 1px solid #ddd; }
h3 { font-size: 16px; margin: 28px 0 4px; }
p { max-width: 74ch; margin: 8px 0; }
.quiet { color: #555; font-size: 14px; }
nav a { margin-right: 18px; color: #1f5a94; display: inline-block; }
figure { margin: 16px 0; }
figure img { display: block; max-width: 100%; height: auto; }
.several { display: grid; gap: 8px 32px;
           grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; margin: 12px 0; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 2px solid #888; font-weight: 600; }
details summary { cursor: pointer; color: #1f5a94; font-size: 14px; }
@media print { nav { display: none; } figure { break-inside: avoid; } }
"""

WIDTH = 480  # width of a picture on the page; it has more pixels, so that it is sharp on every screen


@dataclass(slots=True)
class Picture:
    """PNG with the name of its file, and a description for people who cannot see it."""

    name: str
    png: bytes
    alt: str


@dataclass(slots=True)
class Table:
    """Rows of texts. The first row is the header; a folded table opens on a click."""

    rows: list[list[str]]
    caption: str = ""
    folded: bool = False


@dataclass(slots=True)
class Section:
    """Heading, paragraphs of conclusions and explanations, pictures (two in a row), and tables."""

    title: str
    paragraphs: list[str | Claim]
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def escape(text: str) -> str:
    """Return HTML that shows the text and does nothing else, for use in text and in quoted attributes."""
    return escape_markup(printable(text), quote=True)


def page(title: str, about: list[str], sections: list[Section]) -> str:
    """Return the whole page.

    Args:
        about: lines below the title that name the run, the weights and the images.
    """
    links = "".join(f'<a href="#{_anchor(s.title)}">{escape(s.title)}</a>' for s in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body><header>'
        f"<h1>{escape(title)}</h1>"
        + "".join(f'<p class="quiet">{escape(line)}</p>' for line in about)
        + f"<nav>{links}</nav></header>\n<main>"
        + "\n".join(map(_section, sections))
        + "</main></body></html>\n"
    )


def _section(section: Section) -> str:
    parts = [f'<h2 id="{_anchor(section.title)}">{escape(section.title)}</h2>']
    parts += map(_paragraph, section.paragraphs)
    if section.pictures:
        parts.append('<div class="several">' + "\n".join(map(_picture, section.pictures)) + "</div>")
    return "\n".join([*parts, *map(_table, section.tables)])


def _paragraph(text: str | Claim) -> str:
    if isinstance(text, str):
        return f"<p>{escape(text)}</p>"
    weight = "strong" if text.notable else "span"
    return f"<p><{weight}>{escape(text.verdict)}</{weight}> {escape(text.reasons)}</p>"


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return f'<figure><img src="data:image/png;base64,{data}" width="{WIDTH}" alt="{escape(picture.alt)}"></figure>'


def _table(table: Table) -> str:
    head, *body = table.rows
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    html = (
        '<div class="scroll"><table><thead><tr>'
        + "".join(f"<th>{escape(cell)}</th>" for cell in head)
        + f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    if table.folded:
        return f"<details><summary>{escape(table.caption)}</summary>{html}</details>"
    return (f"<h3>{escape(table.caption)}</h3>" if table.caption else "") + html


def _anchor(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())
