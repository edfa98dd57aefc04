"""The synthetic corpus: the same bytes for the same arguments, the published lengths, and damage where it says so."""

import importlib.util
import statistics
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from capsfusion_ray.config import FilterConfig, InputConfig, SourceConfig
from capsfusion_ray.sources import ReadSpec, discover, frozen_schema, iter_units

spec = importlib.util.spec_from_file_location(
    "make_corpus", Path(__file__).resolve().parents[2] / "benchmarks/make_corpus.py"
)
make_corpus = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = make_corpus  # dataclasses look their module up
spec.loader.exec_module(make_corpus)


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(make_corpus, "GROUP_ROWS", 100)
    monkeypatch.setattr(make_corpus, "HUGE_GROUP_ROWS", 800)


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_shard_made_alone_is_the_shard_made_among_others(tmp_path):
    made = make_corpus.make(tmp_path / "all", 3000, 6, seed=7, damaged=2)
    again = make_corpus.make(tmp_path / "some", 3000, 6, seed=7, damaged=2, only=range(2, 5))
    every = content(tmp_path / "all")
    assert content(tmp_path / "some") == {
        make_corpus.shard_name(n): every[make_corpus.shard_name(n)] for n in (2, 3, 4)
    }
    assert len(every) == 6, "and nothing beside the shards"
    assert again["damaged"].items() <= made["damaged"].items()
    make_corpus.make(tmp_path / "other", 3000, 6, seed=8, damaged=2)
    assert not set(every.values()) & set(content(tmp_path / "other").values())


def test_sizes_are_skewed_and_sum_up():
    for rows, shards in ((1, 1), (10, 10), (999_983, 100), (120_000_000, 640)):
        sizes = make_corpus.shard_rows(rows, shards, seed=1)
        assert sum(sizes) == rows
        assert len(sizes) == shards
        assert min(sizes) >= 1
    assert max(sizes) > 10 * min(sizes)


def test_every_row_is_readable_but_those_that_are_said_to_be_damaged(tmp_path, small_groups):
    made = make_corpus.make(tmp_path, 8000, 8, seed=3, damaged=4)
    sizes = {make_corpus.shard_name(n): size for n, size in enumerate(make_corpus.shard_rows(8000, 8, seed=3))}
    source = SourceConfig(preset="laion_coco")
    shards = discover(InputConfig(path=str(tmp_path)), source)
    read = ReadSpec(frozen_schema(shards, source, FilterConfig()), source, FilterConfig())
    assert read.schema.names[4:] == ["WIDTH", "HEIGHT", "similarity", "hash", "pwatermark", "punsafe"]
    assert sorted(made["damaged"].values()) == ["cut", "cut", "page", "page"]
    for shard in shards:
        how = made["damaged"].get(shard.path, "")
        assert bool(shard.error) == (how == "cut")
        if shard.error:
            continue
        assert shard.rows == sizes[shard.path]
        (unit,) = iter_units(shard, [(0, shard.rows)], read)
        assert len(unit.unreadable) == (how == "page"), shard.path
    assert next(s for s in shards if s.path == make_corpus.shard_name(3) and not s.error).row_groups[0] > 100, (
        "a huge row group"
    )


def test_captions_are_as_long_as_the_published_ones_and_nearly_never_the_same(tmp_path):
    table = make_corpus.block(1, 0, 0, 20_000)
    urls, raw, synthetic = (table[name].to_pylist() for name in ("URL", "TEXT", "top_caption"))
    assert len(set(urls)) == 20_000
    odd = [text for text in raw if not text]
    assert None in odd
    assert "" in odd
    for texts, mean, p95 in ((raw, 10.9, 27), (synthetic, 9.0, 13)):  # of the 10,000 published examples
        words = sorted(len((text or "").split()) for text in texts)
        assert statistics.mean(words) == pytest.approx(mean, rel=0.1)
        assert words[19_000] == pytest.approx(p95, rel=0.15)
    assert 0.99 < len(set(zip(raw, synthetic, strict=True))) / 20_000 < 0.999, "some pairs are doubled"


def test_the_files_types_are_those_of_laion_coco(tmp_path):
    make_corpus.make(tmp_path, 30, 3, seed=1)
    schemas = [pq.read_schema(path) for path in sorted(tmp_path.iterdir())]
    assert {str(schema.field("WIDTH").type) for schema in schemas} == {"int32", "int64", "double"}
    assert [(f.name, str(f.type)) for f in schemas[1] if f.name not in ("WIDTH", "HEIGHT")] == [
        ("URL", "string"),
        ("TEXT", "string"),
        ("top_caption", "string"),
        ("all_captions", "list<element: string>"),
        ("all_similarities", "list<element: double>"),
        ("similarity", "double"),
        ("hash", "int64"),
        ("pwatermark", "double"),
        ("punsafe", "double"),
    ]
