"""A row that kills its worker is found in few deaths, and no other row is rejected."""

from math import ceil, log2

from hypothesis import given
from hypothesis import strategies as st

from capsfusion_ray.run.poison_rows import MAX_SHARED_DEATHS, Attempt, AttemptLog, following


def run_to_the_end(rows, poison, unlucky=()):
    """The attempt that succeeded, and how many workers died; the attempts numbered in `unlucky` die in any case."""
    attempt, deaths = following(None, "run", rows), 0
    while True:
        dies = attempt.number in unlucky
        if not attempt.alone:
            dies |= bool(poison)
        else:
            for first, last in attempt.ranges:
                trial = attempt.on((first, last))
                if any(first <= row < last for row in poison):
                    attempt, dies = trial, True
                    break
        if not dies:
            return attempt, deaths
        attempt, deaths = following(attempt, "run", rows), deaths + 1


@given(st.data(), st.integers(1, 300))
def test_exactly_the_poison_rows_are_found_in_few_deaths(data, rows):
    poison = data.draw(st.sets(st.integers(0, rows - 1), max_size=3))
    unlucky = data.draw(st.sets(st.integers(1, 4), max_size=2))
    attempt, deaths = run_to_the_end(rows, poison, unlucky)
    assert set(attempt.guilty) == poison
    assert sorted(row for first, last in attempt.ranges for row in range(first, last)) == sorted(
        set(range(rows)) - poison
    )
    assert deaths <= MAX_SHARED_DEATHS + len(unlucky) * 2 + len(poison) * (ceil(log2(rows)) + 2 if rows > 1 else 2)


def test_a_unit_shares_the_engine_until_its_second_death():
    attempt = following(None, "run", 10)
    for number in range(1, MAX_SHARED_DEATHS + 1):
        assert (attempt.number, attempt.alone) == (number, False)
        attempt = following(attempt, "run", 10)
    assert attempt.alone


def test_attempts_under_a_killed_driver_do_not_count_as_deaths():
    assert following(Attempt("before", 7, ((0, 10),)), "now", 10) == following(None, "now", 10)


def test_the_log_keeps_an_attempt_until_the_unit_is_fused(store):
    log = AttemptLog(store, "run")
    first = log.begin("u1", 8)
    log.note("u1", first.on((0, 8)))
    assert log.begin("u1", 8) == following(first.on((0, 8)), "run", 8)
    log.end("u1")
    assert log.begin("u1", 8) == first
