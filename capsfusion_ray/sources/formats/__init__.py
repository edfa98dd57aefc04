"""The formats of input files. To add one, write a file with a class that has Format's methods, and add a line to FORMATS."""

from capsfusion_ray.sources.formats.base import Format
from capsfusion_ray.sources.formats.delimited import CSV, TSV
from capsfusion_ray.sources.formats.json_array import JSON_ARRAY
from capsfusion_ray.sources.formats.json_lines import JSON_LINES
from capsfusion_ray.sources.formats.parquet import ParquetFormat

# source.format -> how such files are read.
FORMATS: dict[str, Format] = {
    "parquet": ParquetFormat(),
    "json": JSON_ARRAY,  # a .json file that does not begin with "[" is read as jsonl
    "jsonl": JSON_LINES,
    "csv": CSV,
    "tsv": TSV,
}
