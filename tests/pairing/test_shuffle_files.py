"""Shuffle files: which rows a read task takes."""

from hypothesis import given
from hypothesis import strategies as st

from capsfusion_ray.pairing.shuffle_files import task_ranges


@given(groups=st.lists(st.integers(0, 30), max_size=10), task_rows=st.integers(1, 40), file_rows=st.integers(1, 10))
def test_reads_cover_every_row_once_and_no_row_group_twice(groups, task_rows, file_rows):
    tasks = task_ranges(groups, task_rows, file_rows)
    assert [row for task in tasks for a, b in task for row in range(a, b)] == list(range(sum(groups)))
    assert all(0 < b - a <= file_rows for task in tasks for a, b in task)
    borders = {sum(groups[:i]) for i in range(len(groups) + 1)}
    assert all(task[0][0] in borders and task[-1][1] in borders for task in tasks)
    for task in tasks:
        inside = [g for i, g in enumerate(groups) if g and task[0][0] <= sum(groups[:i]) < task[-1][1]]
        assert sum(inside) <= task_rows or len(inside) == 1
