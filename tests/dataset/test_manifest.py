"""The manifest is replaced by compare-and-swap alone, and it is assembled only from entries that hold every unit once."""

from dataclasses import replace

import pytest
from outputs import run_of, units_of

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.dataset.layout import MANIFEST, group_path
from capsfusion_ray.dataset.manifest import (
    GroupEntry,
    Manifest,
    assemble,
    read_finished,
    read_groups,
    read_manifest,
    swap_manifest,
)
from capsfusion_ray.dataset.plan_files import read_plans
from capsfusion_ray.errors import AccountingError, ConfigError
from capsfusion_ray.storage import Store


@pytest.fixture
def finished(store):
    return run_of(store, units_of(4, 3), ["fused", "kept", "rejected"], OutputConfig(store.root))


def with_kind(manifest, kind):
    return replace(manifest, revisions=(*manifest.revisions, {"revision": 2, "kind": kind}))


def test_a_manifest_that_another_driver_replaced_is_not_overwritten(store, finished):
    """Also where this driver looks at the store again just before it writes: its own edit began from the old manifest."""
    theirs = with_kind(finished, "takedown")
    swap_manifest(store, finished, theirs)
    with pytest.raises(
        AccountingError, match=r"manifest\.json: another driver replaced it.*run the same command again"
    ):
        swap_manifest(store, finished, with_kind(finished, "retry"))
    assert read_manifest(store) == theirs


def test_the_first_manifest_is_written_only_where_there_is_none(store, finished):
    with pytest.raises(AccountingError, match="another driver replaced it"):
        swap_manifest(store, None, with_kind(finished, "base"))
    store.delete([MANIFEST])
    with pytest.raises(AccountingError, match="another driver replaced it"):
        swap_manifest(store, finished, with_kind(finished, "takedown"))
    swap_manifest(store, None, finished)
    assert read_finished(store, "a test") == finished


def test_a_manifest_replaced_between_the_look_and_the_write_is_not_overwritten(tmp_path):
    store = Store(str(tmp_path))
    finished = run_of(store, units_of(2, 3), ["fused", "kept", "rejected"], OutputConfig(store.root))
    theirs = with_kind(finished, "takedown")

    class Late:
        """Another driver writes its manifest after this one has read the old one."""

        def __getattr__(self, name):
            return getattr(store, name)

        def put_if_match(self, path, data, etag):
            store.put(MANIFEST, theirs.to_bytes())
            return store.put_if_match(path, data, etag)

    with pytest.raises(AccountingError, match="another driver replaced it"):
        swap_manifest(Late(), finished, with_kind(finished, "retry"))
    assert read_manifest(store) == theirs


def test_manifest_and_entries_survive_their_files(store, finished):
    assert Manifest.from_bytes(finished.to_bytes()) == finished
    for entry in read_groups(store):
        assert GroupEntry.from_bytes(entry.to_bytes()) == entry
    assert len(read_groups(store)) == 2


def test_only_the_newest_edition_of_a_group_counts(store, finished):
    first = read_groups(store)[0]
    for edition in (2, 10):
        newer = replace(first, edition=edition)
        store.put(newer.path, newer.to_bytes())
        assert newer.path == group_path(first.group, 1, edition)
        assert read_groups(store)[0] == newer
    assert len(read_groups(store)) == 2


def test_a_manifest_of_another_version_is_refused(store, finished):
    store.put(MANIFEST, finished.to_bytes().replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(AccountingError, match="it has version 2, and this program reads version 1"):
        read_manifest(store)


def test_an_output_without_a_manifest_is_refused_with_the_way_out(store):
    with pytest.raises(ConfigError, match="an export needs a finished output; run the fuse command to its end first"):
        read_finished(store, "an export")
    assert read_manifest(store) is None


def test_entries_that_miss_repeat_or_invent_a_unit_are_refused(store, finished):
    plans, (first, second) = read_plans(store), read_groups(store)
    with pytest.raises(AccountingError, match="2 units missing"):
        assemble(plans, [first], [])
    with pytest.raises(AccountingError, match="2 in two entries"):
        assemble(plans, [first, second, replace(second, files=())], [])
    foreign = replace(second, units=(*second.units, replace(second.units[0], id="another")))
    with pytest.raises(AccountingError, match="1 of no plan"):
        assemble(plans, [first, foreign], [])
    with pytest.raises(AccountingError, match="two groups have a data file of the same name"):
        assemble(plans, [first, replace(second, files=(*second.files, first.files[0]))], [])
