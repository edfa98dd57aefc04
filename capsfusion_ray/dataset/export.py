"""A finished output -> a folder that the tools of the field take as it is: jobs/export.py.

`<to>/data/train-00000-of-00012.parquet` as the Hugging Face hub names them, a dataset card with the figures, and the
img2dataset command that fetches the images. Knows stores; no Ray.
"""

from __future__ import annotations

import io
import logging
import shlex
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capsfusion_ray.config import OutputConfig, section, setting
from capsfusion_ray.core.columns import FUSED, RAW, ROW_ID, SYNTHETIC, URL
from capsfusion_ray.core.parquet import read_schema
from capsfusion_ray.dataset.damage import read_intact
from capsfusion_ray.dataset.layout import DATA_DIR
from capsfusion_ray.dataset.manifest import FileEntry, Manifest, read_finished
from capsfusion_ray.dataset.partitions import BY_SHARD
from capsfusion_ray.dataset.plan_files import read_plans
from capsfusion_ray.dataset.read_rows import RowReader
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.storage import Store

log = logging.getLogger(__name__)
THREADS = 4  # each holds one file in memory
CARD, COMMAND = "README.md", "img2dataset.sh"
SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
)


@dataclass(frozen=True)
class ExportConfig:
    """jobs/export.py"""

    output: OutputConfig = section(OutputConfig, required=["path"])
    to: str = setting("", "an empty or new folder, or a URL", common=True, required=True)
    to_storage: dict[str, str] = setting({}, "fsspec options of `to`")
    title: str = setting("Fused image captions", "title of the data card", common=True)
    license: str = setting("other", "licence of the captions, as the hub spells it; only you know it", common=True)


def export(cfg: ExportConfig) -> dict[str, Any]:
    """Write the folder. Raises ConfigError for an output that is not finished or a target that holds another export."""
    began = time.monotonic()
    source, target = Store(cfg.output.path, cfg.output.storage), Store(cfg.to, cfg.to_storage)
    manifest = read_finished(source, "an export")
    files = [file for file in manifest.files if file.kind == DATA_DIR]
    if not files:
        raise ConfigError(f"output.path={cfg.output.path}: no row was fused or kept, so there is nothing to export")
    names = [f"data/train-{number:05d}-of-{len(files):05d}.parquet" for number in range(len(files))]
    foreign = {file.path for file in target.list("data")} - set(names)
    if foreign:
        raise ConfigError(
            f"to={cfg.to}: holds files that are not of this export, such as {min(foreign)}; choose an empty folder"
        )
    partition_by = str(manifest.base.get("output.partition_by", BY_SHARD))
    reader = RowReader(source, read_plans(source)[0].fields, partition_by)

    def copy(file: FileEntry, name: str) -> None:
        data = read_intact(source, file)
        read_schema(io.BytesIO(data), source.url(file.path))  # a column that may run code is not passed on
        target.put(name, data if partition_by == BY_SHARD else _with_column(reader.rows_in(file, data)))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(copy, files, names))
    with target.open_input(names[0]) as first:
        schema = read_schema(first, target.url(names[0]))
    target.put(COMMAND, img2dataset(schema).encode())
    target.put(CARD, card(cfg, manifest, schema).encode())
    rows = sum(file.rows for file in files)
    return {"exported": rows, "files": len(files), "to": cfg.to, "seconds": round(time.monotonic() - began, 2)}


def _with_column(rows: list[tuple[str, pa.Table]]) -> bytes:
    """A file of a column's partition with that column, which stood in its path, back inside."""
    table = pa.concat_tables([of_unit for _, of_unit in rows])
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def img2dataset(schema: pa.Schema) -> str:
    """The command that fetches the images beside their fused captions, in webdataset form."""
    carried = [
        name for name in schema.names if name not in (URL, FUSED) and pa.types.is_primitive(schema.field(name).type)
    ]
    carried = [ROW_ID, RAW, SYNTHETIC, *carried]
    extra = "[" + ",".join(f'"{name}"' for name in carried) + "]"
    return f"""#!/bin/sh
# pip install img2dataset; then run this in the folder of this file. open_clip trains on the shards as they come:
# --train-data 'images/{{00000..00099}}.tar' --dataset-type webdataset (the caption is in .txt, everything else in .json)
set -eu
img2dataset --url_list data --input_format parquet --url_col {URL} --caption_col {FUSED} \\
  --save_additional_columns {shlex.quote(extra)} \\
  --output_folder images --output_format webdataset --number_sample_per_shard 10000 \\
  --image_size 256 --resize_mode keep_ratio --resize_only_if_bigger True --processes_count 8 --thread_count 64
"""


def card(cfg: ExportConfig, manifest: Manifest, schema: pa.Schema) -> str:
    """The dataset card: what the hub reads in front, what people read behind."""
    counts = manifest.counts
    rows = counts.fused + counts.kept
    size = next((name for limit, name in SIZES if rows < limit), "n>1B")
    header = f"""---
license: {cfg.license}
task_categories: [image-to-text, text-to-image]
size_categories: ["{size}"]
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---
"""
    outcome = "\n".join(f"| {name} | {n:,} |" for name, n in counts.rows.items())
    columns = "\n".join(
        f"| `{column.name}` | {column.type} | {_MEANS.get(column.name, 'as in the input')} |" for column in schema
    )
    return f"""{header}
# {cfg.title}

{rows:,} captions of images, each written by a language model from two others: the web's alt text and a captioner's sentence
([CapsFusion](https://arxiv.org/abs/2310.20550), CVPR 2024). Made with capsfusion_ray. The images are not included: `img2dataset.sh` fetches them.

| column | type | |
| --- | --- | --- |
{columns}

| rows | |
| --- | --- |
{outcome}

{_table("Rejected, by reason", counts.reasons)}{_table("Flagged in the dataset", counts.flags)}{_settings(manifest)}"""


_MEANS = {
    URL: "where the image is",
    RAW: "the web's alt text",
    SYNTHETIC: "the captioner's sentence",
    FUSED: "the fused caption",
    ROW_ID: "input shard and row number",
    "flags": "what the gates noticed and did not reject",
}


def _table(title: str, counts: dict[str, int]) -> str:
    if not counts:
        return ""
    lines = "\n".join(f"| {name} | {n:,} |" for name, n in sorted(counts.items(), key=lambda item: -item[1]))
    return f"| {title} | |\n| --- | --- |\n{lines}\n\n"


def _settings(manifest: Manifest) -> str:
    shown: Sequence[str] = (
        "engine.kind",
        "engine.model",
        "engine.dtype",
        "decode.num_beams",
        "decode.max_new_tokens",
        "decode.scoring",
    )
    lines = "\n".join(f"- `{key}`: {manifest.base[key]}" for key in shown if key in manifest.base)
    return f"Settings:\n{lines}\n"
