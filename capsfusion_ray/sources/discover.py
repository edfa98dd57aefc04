"""Find the shards of an input and look into each: format, rows, columns, a content key. Knows no captions and no units.

A shard that cannot be read is returned with its `error`, never raised and never dropped: the plan names it.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from capsfusion_ray.config import InputConfig, SourceConfig
from capsfusion_ray.core.parquet import read_footer
from capsfusion_ray.errors import SourceError
from capsfusion_ray.sources.shard import DAMAGE, Shard, damage_of
from capsfusion_ray.sources.text import first_byte, open_text, scan
from capsfusion_ray.storage import Store, StoredFile

LOG = logging.getLogger(__name__)

FOOTER_THREADS = 16  # a footer is two small requests; 16 at once read a thousand in a few seconds
SAMPLE_BYTES = 64 << 10  # of head, middle and tail, for the content key where the store gives no etag

FORMATS = {
    "parquet": "parquet",
    "pq": "parquet",
    "json": "json",  # an array or lines: its first byte tells
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "csv": "csv",
    "tsv": "tsv",
}
COMPRESSIONS = {"gz": "gzip", "zst": "zstd", "bz2": "bz2"}


def discover(input: InputConfig, source: SourceConfig) -> list[Shard]:
    """All shards of `input.path` (files, globs, folders, URLs), in the order of the paths, sorted within each.

    Ignored, and counted in the log: names starting with "_", foreign extensions. Hidden files are not even listed. Raises
    SourceError where a path matches nothing, StorageError or StoreRefused where the store itself fails.
    """
    found: dict[str, Shard] = {}  # by URL: a file named twice is one shard
    prefixes: dict[str, str] = {}
    for text in input.paths:
        store, files, named = _listed(text, input.storage)
        shards = _recognised(text, store, files, named, source)
        if not shards:
            raise SourceError(
                f"input.path={text!r}: no {', '.join(sorted(FORMATS))} file there (also .gz, .zst, .bz2); "
                "check the path, or set source.format where the names have no extension"
            )
        for shard in shards:
            if (url := store.url(shard.file)) not in found:
                found[url] = replace(shard, path=_prefix(shard.root, prefixes) + shard.file)
    for path, count in Counter(shard.path for shard in found.values()).items():
        if count > 1:
            raise SourceError(f"input.path: two files would both be called {path!r} in row ids; rename a folder")
    stores = {root: Store(root, input.storage) for root in prefixes}
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return list(pool.map(lambda shard: _inspected(shard, stores[shard.root], source), found.values()))


def _prefix(root: str, prefixes: dict[str, str]) -> str:
    """What tells the files of several roots apart in row ids.

    The first root gets none, so that row ids stay as they are when a folder is added behind it; the others get their last
    folder's name, with a short hash of the root where that name is taken.
    """
    if root not in prefixes:
        name = root.rstrip("/").rpartition("/")[2]
        if f"{name}/" in prefixes.values():
            name += "-" + hashlib.sha256(root.encode()).hexdigest()[:6]
        prefixes[root] = f"{name}/" if prefixes else ""
    return prefixes[root]


def _listed(text: str, options: dict[str, str]) -> tuple[Store, list[StoredFile], bool]:
    """The store whose root row ids are relative to, its files that `text` means, and whether `text` names just one."""
    if not text:
        raise SourceError("input.path is empty; give a file, a glob, a folder or a URL such as s3://bucket/folder")
    whole = Store(text, options)
    parent, _, name = whole.root.rpartition("/")
    if name and not parent.endswith("/"):  # "s3://bucket" has no parent
        store = Store(parent or "/", options)
        if store.exists(name):
            return store, [file for file in store.list(name) if file.path == name], True
    wild = re.search(r"[*?\[]", whole.root)
    if not wild:
        return whole, whole.list(), False
    parent, _, _ = whole.root[: wild.start()].rpartition("/")
    store = Store(parent or "/", options)
    matches = re.compile(_glob_regex(whole.root[len(parent) + 1 :])).fullmatch
    return store, [file for file in store.list() if matches(file.path)], False


def _glob_regex(pattern: str) -> str:
    """ "*" and "?" stay within a folder, "**/" spans folders, "[a-c]" as in a shell."""
    out, rest = "", pattern
    while rest:
        for token, regex in (("**/", "(?:.*/)?"), ("**", ".*"), ("*", "[^/]*"), ("?", "[^/]")):
            if rest.startswith(token):
                out, rest = out + regex, rest[len(token) :]
                break
        else:
            group = re.match(r"\[(!?)([^\]]+)\]", rest)
            if group:
                escaped = group[2].replace("\\", "\\\\")
                out += f"[{'^' if group[1] else ''}{escaped}]"
            else:
                out += re.escape(rest[0])
            rest = rest[group.end() if group else 1 :]
    return out


def _recognised(text: str, store: Store, files: list[StoredFile], named: bool, source: SourceConfig) -> list[Shard]:
    """The files that are shards; a file named by itself always is, whatever its name."""
    shards, ignored = [], Counter[str]()
    for file in files:
        name = file.path.rpartition("/")[2]
        parts = name.lower().split(".")
        compression = COMPRESSIONS.get(parts[-1], "")
        extension = (parts[:-1] if compression else parts)[-1] if len(parts) > 1 else ""
        format = FORMATS.get(extension, "")
        if not named and (name.startswith("_") or file.path.startswith("_") or "/_" in file.path):
            ignored["names starting with '_'"] += 1
        elif not named and not format and not (source.format != "auto" and not extension):
            ignored[f".{extension}" if extension else "no extension"] += 1
        elif (
            not named
            and source.format not in ("auto", format)
            and format
            and (source.format, format) != ("jsonl", "json")
        ):
            ignored[f".{extension}, as source.format={source.format}"] += 1
        else:
            format = format if source.format == "auto" else source.format
            shards.append(Shard(store.root, file.path, file.path, file.size, file.etag, format, compression))
    if ignored:
        LOG.info("%s: ignored %s", text, ", ".join(f"{n} files ({why})" for why, n in sorted(ignored.items())))
    return shards


# ------------------------------------------------------------------------------------------------ one shard


def _inspected(shard: Shard, store: Store, source: SourceConfig) -> Shard:
    try:
        shard = replace(shard, content_key=shard.content_key or _sampled_key(store, shard))
        if shard.size == 0:
            return replace(shard, error="zero bytes")
        format = shard.format
        if format in ("", "json") and source.format in ("auto", "json"):
            format = _sniffed(store, shard)
        if not format:
            raise SourceError(f"{store.url(shard.file)}: its name does not tell its format; set source.format")
        if format == "parquet":
            with store.open_input(shard.file) as file:
                footer = read_footer(file)
            groups = tuple(footer.metadata.row_group(g).num_rows for g in range(footer.metadata.num_row_groups))
            rows, schema = footer.metadata.num_rows, footer.schema.remove_metadata()
            shard = replace(shard, refused=footer.refused)
        else:
            with open_text(store, shard.file, shard.compression) as stream:
                rows, schema = scan(stream, format)
            groups = (rows,)
        return replace(shard, format=format, rows=rows, row_groups=groups, schema=schema)
    except FileNotFoundError:
        return replace(shard, error="a link to nothing, or deleted since it was listed")
    except DAMAGE as error:
        return replace(shard, error=damage_of(error, store.url(shard.file)))


def _sniffed(store: Store, shard: Shard) -> str:
    with open_text(store, shard.file, shard.compression) as stream:
        return {b"[": "json", b"{": "jsonl", b"P": "parquet"}.get(first_byte(stream), shard.format and "jsonl")


def _sampled_key(store: Store, shard: Shard) -> str:
    """Size, head, middle and tail: what an edit changes and a copy or a `touch` does not. A parquet's tail is its footer."""
    digest = hashlib.sha256(str(shard.size).encode())
    with store.open_input(shard.file) as file:
        for at in sorted({0, max(0, shard.size // 2), max(0, shard.size - SAMPLE_BYTES)}):
            file.seek(at)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
