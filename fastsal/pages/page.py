"""A page put together from the top to the bottom: as HTML that needs no other file and asks for none, and as Markdown."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastsal.files import MARK, replacing

FRAME = """<!doctype html>
<html lang="en">
<!-- {mark} -->
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
<script type="module">
{script}</script>
</body>
</html>
"""
LONG = 20  # rows, above which a table scrolls and can be searched
SEARCH = '<label>contains <input type="search"></label> <output></output>'


@dataclass(frozen=True)
class Drawn:
    """A figure that is written: the name of its files, title, SVG and caption."""

    name: str
    title: str
    svg: bytes
    caption: str


def _begins_with_a_word(cell: str) -> bool:
    return cell[:1].isalpha() and cell not in ("nan", "inf")


class Page:
    """A page with a title, which grows at its end."""

    def __init__(self, title: str) -> None:
        self.html = [f"<h1>{html.escape(title)}</h1>"]
        self.markdown = [f"# {title}"]

    def heading(self, title: str) -> None:
        """A heading of a section."""
        self.html.append(f"<h2>{html.escape(title)}</h2>")
        self.markdown.append(f"## {title}")

    def paragraph(self, text: str) -> None:
        """A paragraph of plain text."""
        self.html.append(f"<p>{html.escape(text)}</p>")
        self.markdown.append(text)

    def items(self, items: Sequence[tuple[str, str]]) -> None:
        """A list of items, each with what stands out at its beginning, or ""."""
        escaped = [(html.escape(head), html.escape(text)) for head, text in items]
        lines = [f"<li><b>{head}</b> {text}</li>" if head else f"<li>{text}</li>" for head, text in escaped]
        self.html.append(f"<ul>{''.join(lines)}</ul>")
        self.markdown.append("\n".join(f"- **{head}** {text}" if head else f"- {text}" for head, text in items))

    def table(self, rows: Sequence[Mapping[str, str]]) -> None:
        """A table, at least one row of it, from the names of the columns to what stands there. It can be sorted.

        Numbers stand at the right of their columns, words, and the first column, at the left.
        """
        columns = zip(*(row.values() for row in rows), strict=True)
        left = [slot == 0 or any(map(_begins_with_a_word, column)) for slot, column in enumerate(columns)]
        long = len(rows) > LONG
        controls = f'<form class="filter" hidden>{SEARCH}</form>' if long else ""
        kinds = [' class="words"' if words else "" for words in left]
        head = "".join(
            f'<th scope="col"{kind}>{html.escape(name)}</th>' for kind, name in zip(kinds, rows[0], strict=True)
        )
        cells = (
            "".join(f"<td{kind}>{html.escape(cell)}</td>" for kind, cell in zip(kinds, row.values(), strict=True))
            for row in rows
        )
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        self.html.append(
            f'{controls}<div class="wide{" long" * long}" tabindex="0" role="region" aria-label="table">{table}</div>'
        )
        lines = [list(rows[0]), ["---" if words else "--:" for words in left], *(list(row.values()) for row in rows)]
        self.markdown.append("\n".join(f"| {' | '.join(line)} |" for line in lines))

    def raw(self, text: str) -> None:
        """HTML, which the Markdown goes without."""
        self.html.append(text)

    def figure(self, drawn: Drawn) -> None:
        """A figure with its caption: in the page itself, and for the Markdown a PNG beside it."""
        source = base64.b64encode(drawn.svg).decode()
        self.html.append(
            f'<figure><img src="data:image/svg+xml;base64,{source}" alt="{html.escape(drawn.title)}">'
            f"<figcaption>{html.escape(drawn.caption)}</figcaption></figure>"
        )
        self.markdown.append(f"![{drawn.title}]({drawn.name}.png)\n\n{drawn.caption}")

    def write(self, path: Path, title: str, markdown: Path | None = None, option: str = "--out") -> Path:
        """Writes the page, with what a browser's tab says, and perhaps the Markdown. Returns `path`."""
        style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
        body = "\n".join(self.html)
        text = FRAME.format(mark=MARK, title=html.escape(title), style=style, body=body, script=script)
        with replacing(path, option) as file:
            file.write(text.encode())
        if markdown is not None:
            with replacing(markdown, option) as file:
                file.write("\n\n".join([*self.markdown, f"<!-- {MARK} -->\n"]).encode())
        return path
