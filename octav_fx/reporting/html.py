"""A table as HTML, for notebooks."""

import html
from collections.abc import Iterable, Sequence
from typing import Any


def html_table(headers: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Return a table that scrolls inside of its cell; floats have four digits."""
    head = "".join(f"<th>{html.escape(header)}</th>" for header in headers)
    body = "".join("<tr>" + "".join(_cell(value) for value in line) + "</tr>" for line in lines)
    return (
        '<div style="max-height:32em;overflow:auto"><table><thead style="position:sticky;top:0">'
        f"<tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, float):
        return f'<td style="text-align:right">{value:.4g}</td>'
    if isinstance(value, tuple):
        return f"<td>{'x'.join(map(str, value))}</td>"
    return f"<td>{html.escape(str(value))}</td>"
