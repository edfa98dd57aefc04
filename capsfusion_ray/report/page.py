"""The report's page: one HTML file with its style, script and data inside. Knows HTML; no store, no figures.

Captions are data from the web. They travel as JSON whose `<`, `>` and `&` are escaped, and the script puts them on the
page as text nodes only; the page's policy forbids every request.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from importlib import resources
from typing import Any

from capsfusion_ray.provenance import align
from capsfusion_ray.report.sample import Row

_TOKEN = re.compile(r"\w+\s*|[^\w\s]\s*|\s+")
LONGEST = 1_200  # characters of a caption on the page


def render(title: str, shown: dict[str, Any], rows: Sequence[Row]) -> str:
    """The whole page."""
    data = json.dumps({"figures": shown, "rows": [_row(row) for row in rows]}, ensure_ascii=False, separators=(",", ":"))
    inert = data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    parts = {"TITLE": html.escape(title), "STYLE": _asset("page.css"), "SCRIPT": _asset("page.js"), "DATA": inert}
    page = _asset("page.html")
    for name, value in parts.items():
        head, _, tail = page.partition(f"%{name}%")
        page = head + value + tail
    return page


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _row(row: Row) -> dict[str, Any]:
    """A row for the page; `fused` as [text, origin] pieces, origin empty between words."""
    raw, synthetic, fused = (_clip(text) for text in (row.raw, row.synthetic, row.fused))
    pieces: list[tuple[str, str]] = []
    at = 0
    for span in align(fused, raw, synthetic):
        if span.start > at:
            pieces.append((fused[at : span.start], ""))
        pieces.append((fused[span.start : span.end], str(span.origin)))
        at = span.end
    if at < len(fused):
        pieces.append((fused[at:], ""))
    shown: dict[str, Any] = {
        "id": row.id, "url": row.url[:300], "raw": raw, "synthetic": synthetic, "fused": pieces,
        "flags": list(row.flags), "reason": row.reason, "detail": _clip(row.detail), "strata": list(row.strata),
    }  # fmt: skip
    if row.other:
        other = row.other
        texts = {"fused": _changes(fused, _clip(other.fused)), "detail": _clip(other.detail)}
        shown["other"] = {**texts, "flags": list(other.flags), "reason": other.reason}
    return shown


def _changes(before: str, after: str) -> list[tuple[str, str]]:
    """`after` as [text, "changed" or empty] pieces: the words that do not stand there in `before`."""
    old, new = _TOKEN.findall(before), _TOKEN.findall(after)
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    spans = [("".join(new[b:b_end]), "" if kind == "equal" else "changed") for kind, _, _, b, b_end in matcher.get_opcodes()]
    return [span for span in spans if span[0]]


def _clip(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
