"""List, read and write objects under one root: a local folder, an S3-compatible bucket, or another fsspec URL.

Knows nothing of captions, plans or Parquet. All other rooms import from here and from no file of this folder.

Who retries: the S3 client retries by itself (`s3.py`). What still fails is a StorageError; `patiently` waits and repeats the
call where a unit is read, committed or compacted. Elsewhere, and after the last pause of `patiently`, the run stops and can be
resumed. What no retry can mend (an absent bucket, credentials, a read-only folder) is StoreRefused: the run stops.
"""

from capsfusion_ray.storage.arrow_filesystem import arrow_filesystem
from capsfusion_ray.storage.base import FAULTS, StoredFile, StoreFull, StoreRefused
from capsfusion_ray.storage.notes import decode_note, encode_note, read_note, write_note
from capsfusion_ray.storage.store import Store
from capsfusion_ray.storage.waiting import patiently

client_faults = FAULTS.take

__all__ = [
    "Store",
    "StoreFull",
    "StoreRefused",
    "StoredFile",
    "arrow_filesystem",
    "client_faults",
    "decode_note",
    "encode_note",
    "patiently",
    "read_note",
    "write_note",
]
