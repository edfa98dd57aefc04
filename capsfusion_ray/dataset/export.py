"""Export a finished output as a dataset of the Hugging Face hub.

Writes `<to>/data/train-00000-of-00012.parquet` and so on, a dataset card with the counts, and a script that fetches the images.
Knows stores; no Ray.
"""

from __future__ import annotations

import io
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capsfusion_ray.config import OutputConfig, section, setting
from capsfusion_ray.core.parquet import read_schema
from capsfusion_ray.dataset.damage import read_intact
from capsfusion_ray.dataset.dataset_card import card, img2dataset
from capsfusion_ray.dataset.layout import DATA_DIR
from capsfusion_ray.dataset.manifest import FileEntry, read_finished
from capsfusion_ray.dataset.partitions import BY_SHARD
from capsfusion_ray.dataset.plan_files import read_plans
from capsfusion_ray.dataset.read_rows import RowReader
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.storage import Store

log = logging.getLogger(__name__)
THREADS = 4  # each holds one file in memory
CARD, COMMAND = "README.md", "img2dataset.sh"


@dataclass(frozen=True)
class ExportConfig:
    """jobs/export.py"""

    output: OutputConfig = section(OutputConfig, required=["path"])
    to: str = setting("", "an empty or new folder, or a URL", common=True, required=True)
    to_storage: dict[str, str] = setting({}, "fsspec options of `to`")
    title: str = setting("Fused image captions", "title of the data card", common=True)
    license: str = setting("other", "licence of the captions, as the hub spells it; only you know it", common=True)


def export(cfg: ExportConfig) -> dict[str, Any]:
    """Write the folder. Returns exported (rows), files, to and seconds.

    Raises ConfigError for an output that is not finished, or a target with files of another export; AccountingError for a
    damaged data file.
    """
    began = time.monotonic()
    source, target = Store(cfg.output.path, cfg.output.storage), Store(cfg.to, cfg.to_storage)
    manifest = read_finished(source, "an export")
    files = [file for file in manifest.files if file.kind == DATA_DIR]
    if not files:
        raise ConfigError(
            f"output.path={cfg.output.path}: no row was fused or kept, so there is nothing to export; the reasons are in its rejected/ folder"
        )
    names = [f"data/train-{number:05d}-of-{len(files):05d}.parquet" for number in range(len(files))]
    foreign = {file.path for file in target.list("data")} - set(names)
    if foreign:
        raise ConfigError(
            f"to={cfg.to}: it has files of another export, such as {min(foreign)}; choose an empty folder"
        )
    partition_by = str(manifest.base.get("output.partition_by", BY_SHARD))
    reader = RowReader(source, read_plans(source)[0].fields, partition_by)

    def copy(file: FileEntry, name: str) -> None:
        data = read_intact(source, file)
        read_schema(io.BytesIO(data), source.url(file.path))  # refuses a column that may run code
        target.put(name, data if partition_by == BY_SHARD else _with_column(reader.rows_in(file, data)))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(copy, files, names))
    with target.open_input(names[0]) as first:
        schema = read_schema(first, target.url(names[0]))
    target.put(COMMAND, img2dataset(schema).encode())
    target.put(CARD, card(cfg.title, cfg.license, manifest, schema).encode())
    rows = sum(file.rows for file in files)
    return {"exported": rows, "files": len(files), "to": cfg.to, "seconds": round(time.monotonic() - began, 2)}


def _with_column(rows: list[tuple[str, pa.Table]]) -> bytes:
    """A data file with the partition's column inside: until now that column was only in the path."""
    table = pa.concat_tables([of_unit for _, of_unit in rows])
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
