"""HTML of sections, tables and figures, with escaped text."""

import html
import json
from typing import Any


def section(title: str, body: str) -> str:
    """Write a section of a page."""
    return f"<section><h2>{escaped(title)}</h2>{body}</section>"


def table(head: list[str], rows: list[list[str]], *, kind: str = "") -> str:
    """Write a table; without a head where `head` holds empty texts."""
    top = "".join(f"<th>{escaped(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    first = "" if not any(head) else f"<thead><tr>{top}</tr></thead>"
    return (
        f'<div class="scroll"><table class="{kind}">{first}<tbody>{body}</tbody>'
        "</table></div>"
    )


def figure(body: str, caption: str) -> str:
    """Write a figure; without a caption where that is ""."""
    below = f"<figcaption>{escaped(caption)}</figcaption>" if caption else ""
    return f"<figure>{body}{below}</figure>"


def number(value: float | None) -> str:
    """Write a number with four digits, or "" for None."""
    return "" if value is None else f"{value:.4g}"


def escaped(value: Any) -> str:
    """Write a value as escaped text."""
    return html.escape(value if isinstance(value, str) else json.dumps(value))
