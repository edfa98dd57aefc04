"""Compute how many requests a run makes to an S3 store, from its units, files and groups, and what they cost.

The numbers follow from the code of storage/s3.py. A read is HEAD, GET, HEAD, so that bytes and etag belong together; a write
is one PUT of any size; each DELETE is one request. Failed and repeated requests are not included. count_requests.py compares
this with counted requests.
"""

from __future__ import annotations

from dataclasses import dataclass

# USD for 1,000 requests: Amazon S3 Standard, us-east-1, 2026; DELETE is free. Storage and traffic are not in it.
PUT_PRICE, GET_PRICE = 0.005, 0.0004  # PUT and LIST; GET and HEAD
LIST_KEYS = 1000  # a page
PROGRESS_S, HEARTBEAT_S = 10.0, 15.0  # progress.py, lease.py
COLUMNS_READ = 9  # of preset laion_coco; a column chunk is a range of its own


@dataclass(frozen=True)
class Shape:
    """What was made, and how long a real run of it takes."""

    shards: int
    row_groups: int  # of the input
    reads: int  # read tasks: each opens its shard anew
    units: int
    files: int
    groups: int
    hours: float


def requests(shape: Shape) -> dict[str, int]:
    """By kind, of fuse and a deep verify."""
    put = 2 * shape.units  # the attempt's note, the part
    put += shape.files + shape.groups
    put += round(shape.hours * 3600 / PROGRESS_S) + round(shape.hours * 3600 / HEARTBEAT_S)
    get = (1 + 3) * shape.units  # the note looked for, which is not there; the part, compacted
    get += 3 * shape.files + (1 + 3) * shape.groups  # verified; the entry looked for, and read for the repeats
    get += 3 * shape.shards + 3 * shape.reads + COLUMNS_READ * shape.row_groups  # HEAD and two GETs: a footer
    pages = -(-shape.shards // LIST_KEYS) + 3 * (1 + shape.files // LIST_KEYS)  # the input; parts, groups and data
    return {"PUT": put, "GET and HEAD": get, "LIST": pages, "DELETE": 2 * shape.units}


def price(by_kind: dict[str, int]) -> float:
    """USD."""
    return ((by_kind["PUT"] + by_kind["LIST"]) * PUT_PRICE + by_kind["GET and HEAD"] * GET_PRICE) / 1000
