"""Show a finished output in the terminal: fused captions coloured by origin, rejects with their reasons, and counts.

It reads a few rows of a few files, however large the dataset is. Captions are untrusted text from the web, so ANSI escapes,
control characters and terminal markup in them are removed or printed as plain text.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from capsfusion_ray.config import section, setting
from capsfusion_ray.core.accounting import OUTCOMES
from capsfusion_ray.core.columns import DETAIL, FLAGS, FUSED, RAW, REASON, ROW_ID, SYNTHETIC
from capsfusion_ray.core.parquet import open_parquet
from capsfusion_ray.core.word_alignment import Origin, align
from capsfusion_ray.dataset.manifest import Manifest, read_manifest
from capsfusion_ray.errors import ConfigError, SourceError
from capsfusion_ray.reports.sample import as_bytes, spread
from capsfusion_ray.storage import Store

STYLES = {Origin.RAW: "bright_blue", Origin.SYNTHETIC: "yellow", Origin.BOTH: "bold", Origin.NEITHER: "red"}
MEANINGS = {
    Origin.RAW: "the raw caption",
    Origin.SYNTHETIC: "the synthetic caption",
    Origin.BOTH: "both",
    Origin.NEITHER: "neither",
}
REJECTS_SHOWN = 3
_WIDTH = 100  # columns, if the stream is no terminal
_LONGEST = 400  # longer captions are cut after so many characters
_FILES_READ = 8  # spread over all files
_ROWS_READ = 1000  # per file

_ESCAPES = re.compile(
    r"(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"  # operating system commands: hyperlinks, titles
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, cursor movements
    r"|\x1b[@-Z\\-_]"
)
_JOINERS = "\u200c\u200d"  # Persian, Hindi and emoji need them
Row = Mapping[str, Any]


@dataclass(frozen=True)
class ShowOutput:
    """The output to show."""

    path: str = setting("", "a folder, or a URL such as s3://bucket/folder", common=True)
    storage: dict[str, str] = setting({}, "fsspec options, as of capsfusion fuse")


@dataclass(frozen=True)
class ShowConfig:
    """capsfusion show"""

    output: ShowOutput = section(ShowOutput, required=["path"])
    count: int = setting(8, "number of fused captions to print", common=True)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count={self.count}: must be at least 1")


def show(output_dir: str, count: int, stream: IO[str], storage: Mapping[str, str] | None = None) -> None:
    """Print `count` fused captions, a few rejects and the counts. Raises SourceError for a folder without a manifest.

    Captions are coloured if `stream` is a terminal and NO_COLOR is not set. Otherwise the number of words per origin is
    printed instead.
    """
    store = Store(output_dir, storage)
    manifest = read_manifest(store)
    if manifest is None:
        raise SourceError(
            f"{output_dir}: there is no manifest.json; finish the output first: capsfusion fuse output.path={output_dir}"
        )
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(file=stream, highlight=False, markup=False, emoji=False, width=_WIDTH)
    coloured = console.color_system is not None and not console.no_color
    kept_out = _one_of_each_reason(_rows(store, "rejected"), REJECTS_SHOWN)
    fused = spread([row for row in _rows(store, "data") if not _is_copy(row)], count)
    if fused:
        _print_heading(console, "Fused captions", _legend() if coloured else None)
    for row in fused:
        _print_row(console, row, coloured)
    if kept_out:
        _print_heading(console, "Rejected, each with its reason")
    for row in kept_out:
        _print_row(console, row, coloured)
    _print_counts(console, manifest)
    console.print(Text(f"Dataset: {plain(store.url('data'))}"), soft_wrap=True)


def plain(text: object) -> str:
    """Return text on one line that is safe to print: without escapes, control characters and direction overrides."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace")
    kept = (c for c in _ESCAPES.sub("", str(text)) if c.isspace() or c in _JOINERS or unicodedata.category(c)[0] != "C")
    line = " ".join("".join(kept).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def _rows(store: Store, folder: str) -> Iterator[Row]:
    """Yield the first rows of a few files. Captions are bytes, because a rejected one may be invalid UTF-8."""
    names = [file.path for file in store.list(folder) if file.path.endswith(".parquet")]
    for name in spread(names, _FILES_READ):
        with store.open_input(name) as source:
            file = open_parquet(source, where=store.url(name))
            wanted = (RAW, SYNTHETIC, FUSED, ROW_ID, FLAGS, REASON, DETAIL)
            columns = [column for column in wanted if column in file.schema_arrow.names]
            batch = next(file.iter_batches(batch_size=_ROWS_READ, columns=columns), None)
        if batch is None:
            continue
        yield from as_bytes(batch).to_pylist()


def _one_of_each_reason(rows: Iterator[Row], count: int) -> list[Row]:
    """Choose `count` rejects: different reasons first, and within a reason those that have a fused caption."""
    seen: Counter[object] = Counter()
    ranked: list[tuple[int, bool, int, Row]] = []
    for number, row in enumerate(sorted(rows, key=lambda row: not row.get(FUSED))):
        ranked.append((seen[row[REASON]], not row.get(FUSED), number, row))
        seen[row[REASON]] += 1
    return [row for *_, row in sorted(ranked, key=lambda entry: entry[:3])[:count]]


def _is_copy(row: Row) -> bool:
    """Return whether the fused caption is one of the sources (outcome KEPT)."""
    return row[FUSED] is None or row[FUSED] in (row[RAW], row[SYNTHETIC])


def _legend() -> Text:
    parts = [Text("words from ")]
    for origin, style in STYLES.items():
        parts += [Text(MEANINGS[origin], style=style), Text(" · ")]
    return Text.assemble(*parts[:-1])


def _print_heading(console: Console, title: str, beside: Text | None = None) -> None:
    console.print()
    console.print(Text.assemble((title, "bold underline"), "   ", beside) if beside else Text(title, "bold underline"))
    console.print()


def _print_row(console: Console, row: Row, coloured: bool) -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True, min_width=9)
    grid.add_column(overflow="fold")
    raw, synthetic, fused = (row.get(name) for name in (RAW, SYNTHETIC, FUSED))
    grid.add_row("raw", _caption(raw))
    grid.add_row("synthetic", _caption(synthetic))
    if fused:
        text = plain(fused)
        spans = align(text, plain(raw or b""), plain(synthetic or b""))
        line = Text(text)
        for span in spans:
            line.stylize(STYLES[span.origin], span.start, span.end)
        grid.add_row("fused", line)
        if not coloured and spans:
            words = Counter(span.origin for span in spans)
            shares = (f"{words[origin]} from {meaning}" for origin, meaning in MEANINGS.items() if words[origin])
            grid.add_row("", Text(f"{len(spans)} words: {', '.join(shares)}", style="dim"))
    if row.get(REASON):
        detail = plain(row.get(DETAIL) or b"")
        grid.add_row("reason", Text.assemble((plain(row[REASON]), "bold red"), f": {detail}" if detail else ""))
    if row.get(FLAGS):
        grid.add_row("flags", Text(", ".join(plain(flag) for flag in row[FLAGS])))
    grid.add_row("row", Text(plain(row.get(ROW_ID) or b""), style="dim"))
    console.print(grid)
    console.print()


def _caption(caption: object) -> Text:
    if caption is None:
        return Text("(null)", style="dim")
    shown = plain(caption)
    return Text(shown) if shown else Text("(empty)", style="dim")


def _print_counts(console: Console, manifest: Manifest) -> None:
    counts = manifest.counts
    _print_heading(console, "Rows by outcome")
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("planned", f"{counts.planned:,}", "")
    notes = {outcome: _list_counts(causes) for outcome, causes in counts.causes.items()}
    for outcome in OUTCOMES:
        grid.add_row(outcome, f"{getattr(counts, outcome):,}", Text(notes.get(outcome, ""), style="dim"))
    console.print(grid)
    for path, error in manifest.unreadable_shards.items():
        console.print(Text(f"unreadable shard: {plain(path)}: {plain(error)}", style="red"), soft_wrap=True)
    console.print()


def _list_counts(counts: Mapping[str, int]) -> str:
    most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{plain(reason)} {number:,}" for reason, number in most_first)
