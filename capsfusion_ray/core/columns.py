"""The names and Arrow types of all columns: of data files, of parts, and of a unit's table during a run. No I/O, no Ray, no torch."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence

import pyarrow as pa

from capsfusion_ray.core.parquet import read_ipc_schema

# ---------------------------------------------------------------- columns of a unit's table during the run
ROW_ID = "row_id"  # input path relative to the input root + ":" + row number in that file
URL = "image_url"
RAW = "laion_2b"  # the web's alt text
SYNTHETIC = "laion_coco"  # the captioner's sentence
FUSED = "capsfusion"  # the fused caption; in a rejected row: what the engine wrote, if anything
FLAGS = "flags"  # the gates that matched and whose action is "flag"
REFERENCE = "reference"  # a published fused caption, where the input has one

# These three are dropped before the part is written.
INVALID = "_invalid"  # the reader writes here why a row cannot be used
FINISH = "_finish"  # why the engine stopped (FinishReason)
ERROR = "_error"  # the engine's error of a row

# ---------------------------------------------------------------- columns that a part has besides
OUTCOME = "outcome"
REASON = "reason"
DETAIL = "detail"
PROMPT_TOKENS = "prompt_tokens"
OUTPUT_TOKENS = "output_tokens"

ROLES = (URL, RAW, SYNTHETIC, REFERENCE)

PAIR_FIELDS = (
    pa.field(URL, pa.string()),
    pa.field(RAW, pa.string()),
    pa.field(SYNTHETIC, pa.string()),
    pa.field(ROW_ID, pa.string()),
)
DATA_FIELDS = (
    pa.field(URL, pa.string()),
    pa.field(RAW, pa.string()),
    pa.field(SYNTHETIC, pa.string()),
    pa.field(FUSED, pa.string()),
    pa.field(ROW_ID, pa.string()),
    pa.field(FLAGS, pa.list_(pa.string())),
)
REJECT_FIELDS = (pa.field(REASON, pa.string()), pa.field(DETAIL, pa.string()))
PART_FIELDS = (
    pa.field(OUTCOME, pa.string()),
    pa.field(REASON, pa.string()),
    pa.field(DETAIL, pa.string()),
    pa.field(PROMPT_TOKENS, pa.int32()),
    pa.field(OUTPUT_TOKENS, pa.int32()),
)
RESERVED = frozenset(
    (URL, RAW, SYNTHETIC, FUSED, ROW_ID, FLAGS, FINISH, ERROR, OUTCOME, REASON, DETAIL, PROMPT_TOKENS, OUTPUT_TOKENS)
)

_SERIALIZED = "arrow:"


def name_of_type(type: pa.DataType) -> str:
    """A column's type as a plan holds it: Arrow's alias, or the serialized type where it has none (a list, a time zone)."""
    try:
        if pa.type_for_alias(str(type)) == type:
            return str(type)
    except ValueError:
        pass
    return _SERIALIZED + base64.b64encode(pa.schema([("", type)]).serialize()).decode()


def type_of_name(name: str) -> pa.DataType:
    """The inverse of name_of_type. Raises ForeignType for an extension type that may run code."""
    if name.startswith(_SERIALIZED):
        return read_ipc_schema(base64.b64decode(name.removeprefix(_SERIALIZED))).field(0).type
    return pa.type_for_alias(name)


def extra_fields(noted: Iterable[tuple[str, str]]) -> list[pa.Field]:
    """The reference and passthrough columns as Arrow fields. `noted`: (name, name_of_type) of each, from a plan."""
    return [pa.field(name, type_of_name(type_)) for name, type_ in noted]


def part_schema(fields: Sequence[tuple[str, str]]) -> pa.Schema:
    """The schema of a part: the columns of data/ and rejected/, the outcome, and the tokens. `fields`: as Plan.fields."""
    return pa.schema([*DATA_FIELDS, *extra_fields(fields), *PART_FIELDS])
