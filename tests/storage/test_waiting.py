"""A store that fails for minutes: calls are repeated, nothing is read twice, and errors that no repeat can mend are raised at once."""

from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capsfusion_ray import sources
from capsfusion_ray.config import FuseConfig, parse_config
from capsfusion_ray.errors import StorageError
from capsfusion_ray.sources import iter_units, read, read_patiently
from capsfusion_ray.storage import StoreRefused, patiently, waiting
from capsfusion_ray.storage.base import StoreFull


@pytest.fixture
def slept(monkeypatch):
    """The pauses of storage.waiting alone: the watchdog of an actor from another test uses time.sleep, too."""
    pauses = []
    monkeypatch.setattr(waiting, "time", SimpleNamespace(sleep=pauses.append))
    return pauses


@pytest.mark.parametrize("failures", [0, 1, 5])
def test_a_call_is_repeated_after_growing_pauses(slept, failures):
    answers = iter([StorageError("away")] * failures + ["there"])

    def call():
        answer = next(answers)
        if isinstance(answer, StorageError):
            raise answer
        return answer

    assert patiently(call) == "there"
    assert slept == list(waiting.PAUSES_S[:failures])


@pytest.mark.parametrize(
    ("error", "calls"), [(StorageError, len(waiting.PAUSES_S) + 1), (StoreRefused, 1), (StoreFull, 1)]
)
def test_the_last_pause_ends_it_and_refusals_are_raised_at_once(slept, error, calls):
    made = []

    def call():
        made.append(1)
        raise error("no")

    with pytest.raises(error):
        patiently(call)
    assert len(made) == calls


def test_a_read_that_fails_between_units_goes_on_with_the_next(tmp_path, slept, monkeypatch):
    rows = [{"url": f"u{i}", "raw": f"a lighthouse {i}", "synthetic": "A tower."} for i in range(50)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shard.parquet")
    cfg = parse_config(FuseConfig, [f"input.path={tmp_path}", "source.preset=generic"], complete=False)
    (shard,) = sources.discover(cfg.input, cfg.source)
    spec = sources.ReadSpec(sources.frozen_schema([shard], cfg.source, cfg.filter), cfg.source, cfg.filter)
    ranges = [(0, 10), (10, 30), (30, 50)]
    want = [unit.table for unit in iter_units(shard, ranges, spec)]
    asked = []

    def fails_once_after_each(shard, ranges, spec):
        asked.append(tuple(ranges))
        for number, unit in enumerate(iter_units(shard, ranges, spec)):
            if number == 1 and len(asked) < 3:
                raise StorageError("away")
            yield unit

    monkeypatch.setattr(read, "iter_units", fails_once_after_each)
    got = [unit.table for unit in read_patiently(shard, ranges, spec)]
    assert got == want
    assert asked == [tuple(ranges), tuple(ranges[1:]), tuple(ranges[2:])]
    assert slept == [waiting.PAUSES_S[0]] * 2
