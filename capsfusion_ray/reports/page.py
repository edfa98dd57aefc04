"""Write the report page: one HTML file that contains its style, its script and its data. Knows no store.

Captions are untrusted text from the web. They are embedded as JSON whose `<`, `>` and `&` are escaped, and the script adds
them to the page only as text nodes. The page's Content-Security-Policy forbids all requests.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from importlib import resources
from itertools import groupby
from typing import Any

from capsfusion_ray.core.word_alignment import align
from capsfusion_ray.reports.sample import Row

_TOKEN = re.compile(r"\w+|[^\w\s]|\s+")
LONGEST = 1_200  # characters of a caption on the page


def render(title: str, shown: dict[str, Any], rows: Sequence[Row]) -> str:
    """Return the whole page. `shown` are the figures, `rows` the captions to read."""
    data = json.dumps(
        {"figures": shown, "rows": [_row(row) for row in rows]}, ensure_ascii=False, separators=(",", ":")
    )
    inert = (
        data.replace("&", "\\u0026")
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
    parts = {"TITLE": html.escape(title), "STYLE": _asset("page.css"), "SCRIPT": _asset("page.js"), "DATA": inert}
    page = _asset("page.html")
    for name, value in parts.items():
        head, _, tail = page.partition(f"%{name}%")
        page = head + value + tail
    return page


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _row(row: Row) -> dict[str, Any]:
    """Return a row as the page's script reads it. Its caption, and that of the other output, are pieces (see _pieces)."""
    raw, synthetic, fused = (_clip(text) for text in (row.raw, row.synthetic, row.fused))
    shown: dict[str, Any] = {
        "id": row.id,
        "url": row.url[:300],
        "raw": raw,
        "synthetic": synthetic,
        "strata": list(row.strata),
        **_verdict(row),
    }
    if row.other:
        other = _clip(row.other.fused)
        here, there = _differences(fused, other)
        shown["fused"] = _pieces(fused, raw, synthetic, here)
        shown["other"] = {"fused": _pieces(other, raw, synthetic, there), **_verdict(row.other)}
    else:
        shown["fused"] = _pieces(fused, raw, synthetic, [False] * len(fused))
    return shown


def _verdict(row: Row) -> dict[str, Any]:
    return {"flags": list(row.flags), "reason": row.reason, "detail": _clip(row.detail)}


def _pieces(fused: str, raw: str, synthetic: str, changed: Sequence[bool]) -> list[tuple[str, str, int]]:
    """Split a caption into (text, origin, or "" between words, 1 if the other output lacks it). They join to the caption."""
    origins = [""] * len(fused)
    for span in align(fused, raw, synthetic):
        origins[span.start : span.end] = [str(span.origin)] * (span.end - span.start)
    pieces = []
    for (origin, mark), chars in groupby(zip(origins, changed, fused, strict=True), key=lambda char: char[:2]):
        pieces.append(("".join(char for _, _, char in chars), origin, int(mark)))
    return pieces


def _differences(one: str, other: str) -> tuple[list[bool], list[bool]]:
    """Return for each character of both captions whether the other caption lacks its word at that place."""
    words, others = _TOKEN.findall(one), _TOKEN.findall(other)
    here, there = [], []
    for kind, a, a_end, b, b_end in SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
        here += [kind != "equal"] * sum(map(len, words[a:a_end]))
        there += [kind != "equal"] * sum(map(len, others[b:b_end]))
    return here, there


def _clip(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
