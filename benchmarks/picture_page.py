"""One self-contained page of tables and pictures."""

import base64
import html
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Levels = NDArray[np.uint8]

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1500px;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%;image-rendering:pixelated}figure{margin:1.5em 0}"""


def labelled(picture: Levels, label: str) -> Levels:
    """A copy with its label in the top left corner."""
    shown = picture.copy()
    (width, height), _ = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)
    cv2.rectangle(shown, (0, 0), (width + 10, height + 12), (0, 0, 0), -1)
    cv2.putText(shown, label, (5, height + 5), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
    return shown


def write_page(
    path: Path, title: str, origin: str, tables: Mapping[str, Iterable[str]], sheets: dict[str, Path]
) -> None:
    """Write the page.

    Args:
        origin: where the numbers come from, one line.
        tables: title -> lines of a Markdown table.
        sheets: caption -> PNG file; it is embedded as a JPG.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(origin)}</p>"]
    for name, lines in tables.items():
        parts += [f"<h2>{html.escape(name)}</h2>", _table(lines)]
    for caption, sheet in sheets.items():
        buffer = io.BytesIO()
        with Image.open(sheet) as image:
            image.convert("RGB").save(buffer, "JPEG", quality=92, subsampling=0)
        data = base64.b64encode(buffer.getvalue()).decode()
        text = html.escape(caption)
        parts.append(f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="data:image/jpeg;base64,{data}">')
        parts.append("</figure>")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    viewport = '<meta name="viewport" content="width=device-width">'
    path.write_text(f"{head}{viewport}<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n")


def _table(lines: Iterable[str]) -> str:
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    first, *rest = (row for row in rows if not set("".join(row)) <= {"-", ":"})
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in first)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rest)
    return f"<table><tr>{head}</tr>{body}</table>"
