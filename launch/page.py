"""A page that needs no network, and its parts: of the reports of sweeps and of comparisons."""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 0 auto; max-width: 74rem; }
body { padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, figcaption { max-width: 46rem; } .facts, figcaption, .note { color: #555; font-size: .9rem; }
.pictures { display: grid; gap: 1.5rem 1rem; }
.pictures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; min-width: 0; } figure.wide { grid-column: 1 / -1; max-width: 56rem; }
img { width: 100%; height: auto; display: block; } figure.wide img { min-width: 36rem; }
.scroll { overflow-x: auto; } table { border-collapse: separate; font-size: .875rem; white-space: pre; }
table { border-spacing: 0; }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #ddd; } th { border-color: #888; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
th:first-child, td:first-child { max-width: 11rem; overflow: hidden; text-overflow: ellipsis; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.bad { color: #a02020; white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
code { font-size: .85em; overflow-wrap: anywhere; }
.word { display: inline-block; max-width: 100%; overflow-wrap: anywhere; }
@media (min-width: 60rem) { th:first-child, td:first-child { max-width: 20rem; } }
@media print { body { max-width: none; } figure, table { break-inside: avoid; } }
"""


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    title = escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{style}</style>'
        f"</head><body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )


def prose(text: str) -> str:
    """``text`` that runs on from line to line: dates, flags and names are not broken at their hyphens."""
    return re.sub(r"\S*-\S*", r'<span class="word">\g<0></span>', escape(text))


def note(text: str) -> str:
    return f'<p class="note">{prose(text)}</p>'


def figure(png: bytes, caption: str, alt: str = "", wide: bool = False) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    image = f'<div class="scroll"><img alt="{escape(alt or caption)}" src="{source}"></div>'
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def table(head: Iterable[tuple[str, str]], rows: Iterable[Sequence[tuple[str, str]]]) -> str:
    """Cells are (text, class)."""
    cell = lambda tag, text, kind: f'<{tag} class="{kind}">{escape(text)}</{tag}>'.replace(' class=""', "", 1)
    lines = ["".join(cell("th", *one) for one in head)]
    lines += ["".join(cell("td", *one) for one in row) for row in rows]
    return f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'
