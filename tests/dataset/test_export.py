"""Other tools read the dataset in place and as it is exported."""

import shutil

import datasets
import duckdb
import pandas
import pyarrow.dataset as ds
import pytest
import yaml
from outputs import flip_a_bit
from report_runs import run_of, unit

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.dataset.export import ExportConfig, export
from capsfusion_ray.errors import AccountingError, ConfigError

ROWS, REJECTED = 80, 8


@pytest.fixture
def output(tmp_path):
    run_of(tmp_path / "out", [unit(i, 40) for i in range(2)], 2)
    return tmp_path / "out"


def test_data_is_read_without_options(output, tmp_path):
    data = output / "data"
    readers = {
        "pyarrow": lambda: ds.dataset(data).to_table().to_pylist(),
        "pandas": lambda: pandas.read_parquet(data).to_dict("records"),
        "duckdb": lambda: duckdb.sql(f"SELECT * FROM '{data}/**/*.parquet'").fetchdf().to_dict("records"),
        "datasets": lambda: list(
            datasets.load_dataset("parquet", data_dir=str(data), split="train", cache_dir=str(tmp_path / "hf"))
        ),
    }
    for name, read in readers.items():
        rows = read()
        assert len(rows) == ROWS - REJECTED, name
        assert len({row["row_id"] for row in rows}) == len(rows), name
        assert {"image_url", "laion_2b", "laion_coco", "capsfusion", "row_id", "flags"} <= rows[0].keys(), name


def test_an_export_is_a_dataset_of_the_hub(output, tmp_path):
    to = tmp_path / "export"
    done = export(ExportConfig(OutputConfig(str(output)), to=str(to)))
    assert done["exported"] == ROWS - REJECTED
    rows = datasets.load_dataset(str(to), split="train", cache_dir=str(tmp_path / "hf"))
    assert len(rows) == ROWS - REJECTED
    card = (to / "README.md").read_text("utf-8")
    header = yaml.safe_load(card.split("---")[1])
    assert header["configs"][0]["data_files"][0]["path"] == "data/train-*.parquet"
    assert "| planned | 80 |" in card
    assert "--url_col image_url --caption_col capsfusion" in (to / "img2dataset.sh").read_text()
    assert export(ExportConfig(OutputConfig(str(output)), to=str(to)))["files"] == done["files"], (
        "the same export again changes nothing"
    )
    (to / "data" / "other.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"data/other.parquet; choose an empty folder"):
        export(ExportConfig(OutputConfig(str(output)), to=str(to)))


def test_a_damaged_file_is_not_exported(output, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(output, damaged)
    file = flip_a_bit(damaged / "data")
    with pytest.raises(AccountingError, match=rf"{file.name}: damaged \(checksum"):
        export(ExportConfig(OutputConfig(str(damaged)), to=str(tmp_path / "export")))
