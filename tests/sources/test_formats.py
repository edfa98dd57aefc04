"""Formats: one line in FORMATS is enough for a new one, and the array scanner finds every element in chunks of any size."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsfusion_ray.config import FilterConfig, InputConfig, SourceConfig
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.sources import ReadSpec, discover, frozen_schema, read_rows
from capsfusion_ray.sources.formats import FORMATS, json_array
from capsfusion_ray.sources.formats.text import TextFormat, json_kind, lines


def test_a_format_is_added_by_one_line_in_the_table(tmp_path, monkeypatch):
    def records(stream):
        for line in lines(stream):
            raw, bar, synthetic = line.partition("|")
            yield {"raw": raw, "synthetic": synthetic} if bar else None

    monkeypatch.setitem(FORMATS, "bars", TextFormat("bars", ("bars",), b"", records, json_kind))
    (tmp_path / "a").write_text("alt 1|a dog\nno bar\nalt 3|a cat\n")
    source = SourceConfig(format="bars")
    (shard,) = discover(InputConfig(path=str(tmp_path / "a")), source)
    read = read_rows(shard, 0, 3, ReadSpec(frozen_schema([shard], source, FilterConfig()), source, FilterConfig()))
    assert read.table["laion_2b"].to_pylist() == ["alt 1", None, "alt 3"]
    assert read.table["laion_coco"].to_pylist() == ["a dog", None, "a cat"]
    assert read.table["_invalid"].to_pylist() == [None, "bars", None]


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(
        ConfigError, match=r"source\.format='xml': must be auto or one of parquet, json, jsonl, csv, tsv"
    ):
        discover(InputConfig(path=str(tmp_path)), SourceConfig(format="xml"))


def scanned(text, chunk_bytes):
    before, json_array.CHUNK_BYTES = json_array.CHUNK_BYTES, chunk_bytes
    try:
        stream = io.BytesIO(text.encode())
        return list(FORMATS["json"].records(stream))
    finally:
        json_array.CHUNK_BYTES = before


OBJECTS = st.dictionaries(st.text(max_size=3), st.one_of(st.none(), st.integers(), st.text(max_size=9)), max_size=3)


@given(st.lists(OBJECTS, max_size=8), st.integers(1, 40), st.sampled_from([None, 1]))
def test_an_array_is_read_the_same_in_chunks_of_any_size(objects, chunk_bytes, indent):
    assert scanned(json.dumps(objects, indent=indent, ensure_ascii=False), chunk_bytes) == objects


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1}', "does not start with"),
        ("", "damaged after 0 rows"),
        ('[{"a": 1}, {"a"', "damaged after 1 rows"),
        ('[{"a": 1}', "damaged after 1 rows"),
        ("[", "damaged after 0 rows"),
    ],
)
def test_a_text_that_is_no_whole_array_is_damage(text, says):
    with pytest.raises(ValueError, match=says):
        scanned(text, 4)
