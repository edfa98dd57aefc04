"""Find the shards of an input and inspect each: format, rows, columns, a content key. Knows no captions and no units.

A shard that cannot be read is returned with its `error`, so that the plan can name it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from capsfusion_ray.config import InputConfig, SourceConfig
from capsfusion_ray.errors import ConfigError, SourceError
from capsfusion_ray.sources.formats import FORMATS
from capsfusion_ray.sources.formats.text import first_byte, open_text
from capsfusion_ray.sources.shard import DAMAGE, Shard, damage_of
from capsfusion_ray.storage import Store, StoredFile

LOG = logging.getLogger(__name__)

FOOTER_THREADS = 16  # a footer takes two small requests; 16 threads read a thousand footers in a few seconds
SAMPLE_BYTES = 64 << 10  # of head, middle and tail each, for the content key if the store gives no etag

EXTENSIONS = {extension: name for name, format in FORMATS.items() for extension in format.extensions}
COMPRESSIONS = {"gz": "gzip", "zst": "zstd", "bz2": "bz2"}


def discover(input: InputConfig, source: SourceConfig) -> list[Shard]:
    """All shards of `input.path` (files, globs, folders, URLs), in the order of the paths, sorted within each.

    Files with other extensions and names that start with "_" are ignored and counted in the log. Hidden files are not
    listed. Raises ConfigError for an unknown source.format, SourceError for a path that matches nothing, StorageError or
    StoreRefused if the store fails.
    """
    if source.format not in ("auto", *FORMATS):
        raise ConfigError(f"source.format={source.format!r}: must be auto or one of {', '.join(FORMATS)}")
    found: dict[str, Shard] = {}  # by URL, so that a file that two paths match is one shard
    prefixes: dict[str, str] = {}
    for text in input.paths:
        store, files, named = _listed(text, input.storage)
        shards = _recognised(text, store, files, named, source)
        if not shards:
            raise SourceError(
                f"input.path={text!r}: no {', '.join(sorted(EXTENSIONS))} file there (also .gz, .zst, .bz2); "
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


# Names like those of an output's files, as a listing of the input would find them: notes and data files.
_OF_AN_OUTPUT = ("note.json", "data/shard=g00000/part-r001-00000.parquet", "part-00000.parquet")


def refuse_output_in_input(paths: Sequence[str], key: str, output: str) -> None:
    """Raises ConfigError where an input would match the files of the output: the next run would read its own captions.

    `key`: the setting that gave `paths`. Nothing needs to exist yet.
    """
    target = _real(Store(output).root)
    for text in paths:
        whole = _real(Store(text).root) if text else ""
        wild = re.search(r"[*?\[]", whole)
        folder = whole[: wild.start()].rpartition("/")[0] if wild else whole
        inside = target == folder or target.startswith(f"{folder.rstrip('/')}/")
        if not text or not inside:
            continue
        rest = target[len(folder) :].strip("/")
        names = [f"{rest}/{name}" if rest else name for name in _OF_AN_OUTPUT]
        matches = (
            re.compile(_glob_regex(whole[len(folder) :].lstrip("/"))).fullmatch if wild else re.compile(".*").match
        )
        if any(matches(name) for name in names):
            raise ConfigError(
                f"output.path={output}: its files would be found under {key}={text}, and the next run would read them as input; "
                "choose an output folder that is not inside the input"
            )


def _real(root: str) -> str:
    """A local folder without links; a URL as it is."""
    return root if "://" in root else os.path.realpath(root)


def _prefix(root: str, prefixes: dict[str, str]) -> str:
    """The prefix of a root in row ids, which distinguishes the files of several roots.

    The first root has none, so that row ids stay the same when a folder is added after it. The others have the name of their
    last folder, with a short hash of the root if that name is taken.
    """
    if root not in prefixes:
        name = root.rstrip("/").rpartition("/")[2]
        if f"{name}/" in prefixes.values():
            name += "-" + hashlib.sha256(root.encode()).hexdigest()[:6]
        prefixes[root] = f"{name}/" if prefixes else ""
    return prefixes[root]


def _listed(text: str, options: dict[str, str]) -> tuple[Store, list[StoredFile], bool]:
    """The store at the root of the row ids, the files that `text` matches, and whether `text` is the name of one file."""
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
    """A regular expression for a glob: "*" and "?" match within a folder, "**/" any number of folders, "[a-c]" as in a shell."""
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
    """The files that are shards. A file whose own name was given (`named`) is one, whatever its extension."""
    shards, ignored = [], Counter[str]()
    for file in files:
        name = file.path.rpartition("/")[2]
        parts = name.lower().split(".")
        compression = COMPRESSIONS.get(parts[-1], "")
        extension = (parts[:-1] if compression else parts)[-1] if len(parts) > 1 else ""
        format = EXTENSIONS.get(extension, "")
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
    """The shard with rows, columns and content key, or with its error."""
    try:
        shard = replace(shard, content_key=shard.content_key or _sampled_key(store, shard))
        if shard.size == 0:
            return replace(shard, error="zero bytes")
        format = shard.format
        if format in ("", "json") and source.format in ("auto", "json"):
            format = _sniffed(store, shard)
        if not format:
            raise SourceError(
                f"{store.url(shard.file)}: its name and its first byte do not tell the format; set source.format"
            )
        return FORMATS[format].inspect(store, replace(shard, format=format))
    except FileNotFoundError:
        return replace(shard, error="a link to nothing, or deleted since it was listed")
    except DAMAGE as error:
        return replace(shard, error=damage_of(error, store.url(shard.file)))


def _sniffed(store: Store, shard: Shard) -> str:
    """The format by the first byte of the file; for another first byte jsonl if the name ends in .json, else empty."""
    with open_text(store, shard.file, shard.compression) as stream:
        first = first_byte(stream)
    return next(
        (name for name, each in FORMATS.items() if first and each.first_byte == first), shard.format and "jsonl"
    )


def _sampled_key(store: Store, shard: Shard) -> str:
    """A hash of size, head, middle and tail. An edit changes it; a copy or a `touch` does not. The tail of Parquet is its footer."""
    digest = hashlib.sha256(str(shard.size).encode())
    with store.open_input(shard.file) as file:
        for at in sorted({0, max(0, shard.size // 2), max(0, shard.size - SAMPLE_BYTES)}):
            file.seek(at)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
