"""The keys by which two tables are paired: as texts that are compared, and the bucket of each. Pure: Arrow arrays in and out."""

from __future__ import annotations

import zlib

import pyarrow as pa
import pyarrow.compute as pc


def normalised_urls(urls: pa.Array) -> pa.Array:
    """A key per URL, in which differences without meaning are removed. The result is no URL.

    Removed: white space around it, `&amp;` for `&`, the scheme (http, https, or none before `//`), upper case (ASCII) in the
    host, the ports :80 and :443, the fragment, and an empty path in place of `/`. Kept: case after the host, `www.`, the
    order of the query, percent-escapes. What is no http URL keeps all but the white space and `&amp;`.
    """
    plain = pc.replace_substring(pc.ascii_trim_whitespace(urls), "&amp;", "&")
    parts = pc.extract_regex(plain, r"^(?:(?i:https?):)?//(?P<host>[^/?#]*)(?P<rest>[^#]*)")
    host = pc.replace_substring_regex(pc.ascii_lower(pc.struct_field(parts, "host")), r":(?:80|443)$", "")
    rest = pc.replace_substring_regex(pc.struct_field(parts, "rest"), r"^(\?|$)", r"/\1")
    return pc.coalesce(pc.binary_join_element_wise(host, rest, ""), plain)


def keys_of(column: pa.Array, normalise: str) -> pa.Array:
    """A key column (text or integers) as the texts that are compared; null for an empty key. `normalise`: none or url."""
    keys = column.cast(pa.string())
    if normalise == "url":
        keys = normalised_urls(keys)
    return pc.if_else(pc.equal(keys, ""), pa.scalar(None, pa.string()), keys)


def buckets_of(keys: pa.Array, partitions: int) -> pa.Array:
    """The bucket of each key (no nulls): crc32 modulo `partitions`, because Python's hash() differs from process to process."""
    return pa.array([zlib.crc32(key) % partitions for key in keys.cast(pa.binary()).to_pylist()], pa.int32())
