"""A JSON array of objects, read element by element."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from capsfusion_ray.sources.formats.text import CHUNK_BYTES, Record, TextFormat, json_kind

MAX_ELEMENT_BYTES = 64 << 20  # of one element; a longer one means that the array is damaged


class _ArrayScanner:
    """Finds the elements of one JSON array in a stream. It holds one chunk of text, or one element if that is longer."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream = stream
        self._decode = json.JSONDecoder().raw_decode
        self._to_text = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text, self._at, self._ended = "", 0, False
        self._chunk_bytes = CHUNK_BYTES

    def elements(self) -> Iterator[Any]:
        """Raises ValueError if the text is no array, or ends or breaks inside of it."""
        if self._peek() not in ("[", ""):
            raise ValueError("not a JSON array: it does not start with '['")
        self._at += 1
        rows = 0
        while self._peek() != "]":
            yield self._element(rows)
            rows += 1

    def _peek(self) -> str:
        """The next character that is neither white space nor a comma; empty at the end of the stream."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n,":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read_on()

    def _element(self, rows: int) -> Any:
        while True:
            try:
                value, self._at = self._decode(self._text, self._at)
                return value
            except (ValueError, RecursionError) as error:
                if self._ended or len(self._text) - self._at > MAX_ELEMENT_BYTES:
                    raise ValueError(f"the JSON array breaks off or is damaged after {rows} rows: {error}") from None
                self._read_on()

    def _read_on(self) -> None:
        """Drop the text before the current place and append a chunk."""
        more = self._stream.read(self._chunk_bytes)
        # If an element is longer than the text, the next chunk is larger, so that it is not parsed once per chunk.
        self._chunk_bytes = self._chunk_bytes * 2 if self._at == 0 else CHUNK_BYTES
        self._text, self._at, self._ended = self._text[self._at :] + self._to_text.decode(more, not more), 0, not more


def _records(stream: pa.NativeFile) -> Iterator[Record]:
    for element in _ArrayScanner(stream).elements():
        yield element if isinstance(element, dict) else None


JSON_ARRAY = TextFormat("json", ("json",), b"[", _records, json_kind)
