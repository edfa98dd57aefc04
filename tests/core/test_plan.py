"""Plans: every row in exactly one unit, whatever the shards, the limits and the extensions."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsfusion_ray.core.plan import Plan, cut_range, make_plan, read_tasks, wanted_ranges
from capsfusion_ray.errors import PlanChanged


@dataclass(frozen=True)
class FakeShard:
    path: str
    rows: int | None
    row_groups: tuple[int, ...] = ()
    content_key: str = "k"
    error: str = ""


groups = st.lists(st.integers(1, 50), min_size=1, max_size=6)
shard_lists = st.lists(groups, min_size=1, max_size=6).map(
    lambda all_groups: [FakeShard(f"s{i}", sum(g), tuple(g)) for i, g in enumerate(all_groups)]
)


def rows_of(plans):
    return sorted((u.path, row) for plan in plans for u in plan.units for row in range(u.start, u.stop))


@given(groups, st.integers(1, 60), st.data())
def test_units_tile_any_range_of_any_row_groups(row_groups, unit_rows, data):
    total = sum(row_groups)
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    cuts = list(cut_range(start, stop, row_groups, unit_rows))
    assert [row for a, b in cuts for row in range(a, b)] == list(range(start, stop))
    assert all(0 < b - a <= unit_rows for a, b in cuts)


@given(shard_lists, st.integers(1, 40))
def test_a_plan_holds_every_row_once(shards, unit_rows):
    plan = make_plan(shards, {}, unit_rows)
    assert rows_of([plan]) == sorted((s.path, row) for s in shards for row in range(s.rows))
    assert len({unit.id for unit in plan.units}) == len(plan.units)


@given(shard_lists, st.integers(1, 40), st.integers(1, 200), st.integers(1, 200))
def test_a_pilot_then_a_larger_one_then_the_whole_never_plans_a_row_twice(shards, unit_rows, a, b):
    plans = []
    for limit in (min(a, b), max(a, b), None):
        plans.append(make_plan(shards, {}, unit_rows, limit=limit, before=plans))
        total = sum(s.rows for s in shards)
        assert len(rows_of(plans)) == len(set(rows_of(plans))) == min(limit or total, total)
    assert make_plan(shards, {}, unit_rows, before=plans).units == ()


@given(shard_lists, st.integers(1, 300))
def test_a_limit_is_met_and_spread_over_all_shards(shards, limit):
    taken = wanted_ranges(shards, limit)
    assert sum(taken.values()) == min(limit, sum(s.rows for s in shards))
    fair = limit // len(shards)
    assert all(taken[s.path] >= min(s.rows, fair) for s in shards)


@given(shard_lists, st.integers(1, 40))
def test_units_that_share_a_row_group_are_read_together(shards, unit_rows):
    plan = make_plan(shards, {}, unit_rows)
    row_groups = {s.path: s.row_groups for s in shards}
    decoded = []
    for task in read_tasks(plan.units, row_groups):
        edge, touched = 0, set()
        for i, rows in enumerate(row_groups[task[0].path]):
            if any(u.start < edge + rows and u.stop > edge for u in task):
                touched.add((task[0].path, i))
            edge += rows
        decoded += sorted(touched)
    assert len(decoded) == len(set(decoded)), "a row group would be decoded by two read tasks"


@settings(max_examples=30)
@given(shard_lists, st.integers(1, 40), st.integers(1, 4))
def test_a_plan_read_from_its_bytes_is_the_same_plan(shards, unit_rows, max_groups):
    plan = make_plan(shards, {"prompt": "p", "n": 3}, unit_rows, (("w", "double"),), max_groups=max_groups)
    assert Plan.from_bytes(plan.to_bytes()) == plan
    assert len({unit.group for unit in plan.units}) <= max_groups


def test_new_shards_get_new_groups_and_old_ones_keep_theirs():
    old = [FakeShard("b", 10), FakeShard("d", 10)]
    first = make_plan(old, {}, 5)
    second = make_plan([FakeShard("a", 7), *old, FakeShard("c", 7)], {}, 5, before=[first])
    assert {u.path for u in second.units} == {"a", "c"}
    assert not {u.group for u in second.units} & {u.group for u in first.units}


def test_a_changed_setting_is_refused_by_name_with_both_values():
    first = make_plan([FakeShard("a", 3)], {"decode.num_beams": 3, "prompt": "x"}, 5)
    with pytest.raises(PlanChanged, match=r"decode\.num_beams: was 3, now 1"):
        make_plan([FakeShard("a", 3)], {"decode.num_beams": 1, "prompt": "x"}, 5, before=[first])


def test_a_changed_shard_is_refused_by_name():
    shard = FakeShard("a", 3)
    first = make_plan([shard], {}, 5)
    with pytest.raises(PlanChanged, match="a: the input file changed"):
        make_plan([replace(shard, content_key="other")], {}, 5, before=[first])


def test_unreadable_and_empty_shards_have_no_units_but_the_plan_names_them():
    plan = make_plan([FakeShard("bad", None, error="torn"), FakeShard("none", 0), FakeShard("ok", 2)], {}, 5)
    assert {u.path for u in plan.units} == {"ok"}
    assert {s.path: s.error for s in plan.shards} == {"bad": "torn", "none": "", "ok": ""}


def test_the_same_files_under_another_root_are_not_planned_again():
    """input.path=/d/a first and /d later, or two roots in another order: row ids begin with the path, so all rows would be new."""
    first = make_plan([FakeShard("a.parquet", 9, content_key="x"), FakeShard("b.parquet", 9, content_key="y")], {}, 5)
    moved = [FakeShard("a/a.parquet", 9, content_key="x"), FakeShard("b.parquet", 9, content_key="y")]
    with pytest.raises(PlanChanged, match=r"a/a\.parquet: .* the same file as a\.parquet; give input\.path as it was"):
        make_plan(moved, {}, 5, before=[first])
    copy = [
        *(FakeShard(s.path, s.rows, content_key=s.content_key) for s in first.shards),
        FakeShard("copy.parquet", 9, content_key="x"),
    ]
    assert {unit.path for unit in make_plan(copy, {}, 5, before=[first]).units} == {"copy.parquet"}, (
        "a copy beside the original is planned, because the user put it there"
    )
    gone = make_plan([FakeShard("b.parquet", 9, content_key="y")], {}, 5, before=[first])
    assert not gone.units, "a shard whose rows are planned may be deleted"
