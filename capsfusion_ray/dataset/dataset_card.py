"""The dataset card of an export, and the script that fetches the images. Texts only: knows no store."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import pyarrow as pa

from capsfusion_ray.core.columns import FLAGS, FUSED, RAW, ROW_ID, SYNTHETIC, URL
from capsfusion_ray.dataset.manifest import Manifest

SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
)


def img2dataset(schema: pa.Schema) -> str:
    """A shell script that fetches the images and stores them with their fused captions in webdataset format."""
    carried = [
        name for name in schema.names if name not in (URL, FUSED) and pa.types.is_primitive(schema.field(name).type)
    ]
    carried = [ROW_ID, RAW, SYNTHETIC, *carried]
    extra = "[" + ",".join(f'"{name}"' for name in carried) + "]"
    return f"""#!/bin/sh
# Run "pip install img2dataset", then this script in its folder. open_clip trains on the shards without conversion:
# --train-data 'images/{{00000..00099}}.tar' --dataset-type webdataset (the caption is in .txt, everything else in .json)
set -eu
img2dataset --url_list data --input_format parquet --url_col {URL} --caption_col {FUSED} \\
  --save_additional_columns {shlex.quote(extra)} \\
  --output_folder images --output_format webdataset --number_sample_per_shard 10000 \\
  --image_size 256 --resize_mode keep_ratio --resize_only_if_bigger True --processes_count 8 --thread_count 64
"""


def card(title: str, license_: str, manifest: Manifest, schema: pa.Schema) -> str:
    """The README.md of a dataset on the hub. `license_`: as the hub spells it; `schema`: of the exported files."""
    counts = manifest.counts
    rows = counts.fused + counts.kept
    size = next((name for limit, name in SIZES if rows < limit), "n>1B")
    header = f"""---
license: {license_}
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
# {title}

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
    FLAGS: "the gates that matched and did not reject the row",
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
