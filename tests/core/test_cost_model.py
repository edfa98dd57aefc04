"""Compare the estimated hours with a simulated pool of actors, event by event, with and without preemption."""

import heapq
import random
from statistics import mean

import pytest

from capsfusion_ray.core.cost_model import DRAIN, Estimate

UNIT_ROWS, SPEED = 100, 1.0
UNIT_S = UNIT_ROWS / SPEED
QUEUED = 4  # units that an actor of the pipeline holds: two in its engine, two queued


def simulated_s(actors, units, life_s, restart_s, drain_s, seed):
    """Seconds from the mean start of the actors' first units to the end of the last unit.

    A unit goes to the living actor that holds the fewest units, and stays with it: the units of a dead actor wait for its
    successor, as in Ray. A unit ends `drain_s` after the next unit began.
    """
    chance = random.Random(seed)
    left, done = units, 0
    held, ending, alive, lives = [0] * actors, [0] * actors, [False] * actors, [0] * actors
    began = {}
    events = [(chance.uniform(0, UNIT_S), "up", actor, 0) for actor in range(actors)]
    if life_s:
        events.append((UNIT_S + chance.expovariate(actors / life_s), "death", 0, 0))
    heapq.heapify(events)

    def work(actor, now):
        began.setdefault(actor, now)
        heapq.heappush(events, (now + UNIT_S * chance.uniform(0.85, 1.15), "end", actor, lives[actor]))

    while done < units:
        now, what, actor, life = heapq.heappop(events)
        if what == "death":
            actor = chance.randrange(actors)
            if alive[actor] and (held[actor] or left):
                alive[actor], ending[actor], lives[actor] = False, 0, lives[actor] + 1
                heapq.heappush(events, (now + restart_s, "up", actor, lives[actor]))
            heapq.heappush(events, (now + chance.expovariate(actors / life_s), "death", 0, 0))
            continue
        if life != lives[actor]:
            continue
        if what == "ended":
            held[actor], ending[actor], done = held[actor] - 1, ending[actor] - 1, done + 1
        elif what == "end":
            ending[actor] += 1
            heapq.heappush(events, (now + drain_s, "ended", actor, life))
        alive[actor] = True
        if what != "ended" and held[actor] > ending[actor]:
            work(actor, now)
        while left and (free := [one for one in range(actors) if alive[one] and held[one] < QUEUED]):
            least = min(free, key=held.__getitem__)
            held[least], left = held[least] + 1, left - 1
            if held[least] == ending[least] + 1:
                work(least, now)
    return now - mean(began.values())


def predicted(actors, units, **spot):
    return Estimate(units * UNIT_ROWS, units, actors, SPEED, 0, 0, 1.0, 2.5, "", **spot)


@pytest.mark.parametrize("actors", [1, 8, 64])
@pytest.mark.parametrize("units_each", [8, 40])
@pytest.mark.parametrize(("life_units", "restart_units"), [(None, 0.0), (80, 0.2), (80, 1.0), (20, 0.2), (20, 1.0)])
@pytest.mark.parametrize("drain_units", [0.0, 0.15, 0.5])
def test_predicted_hours_are_those_of_a_simulated_pool(actors, units_each, life_units, restart_units, drain_units):
    life_s, restart_s = life_units and life_units * UNIT_S, restart_units * UNIT_S
    runs = 200 // actors + 6  # one actor meets few deaths
    found = mean(
        simulated_s(actors, actors * units_each, life_s, restart_s, drain_units * UNIT_S, seed) for seed in range(runs)
    )
    spot = {"preempted_every_h": life_s and life_s / 3600, "restart_s": restart_s}
    quote = predicted(actors, actors * units_each, captions_in_flight=drain_units * UNIT_S * SPEED / DRAIN, **spot)
    print(
        f"{actors} actors, {units_each} units each, a drain of {drain_units}: {found / UNIT_S:.1f} units' time, predicted {quote.seconds / found - 1:+.1%}"
    )
    assert quote.seconds == pytest.approx(found, rel=0.10)


def test_preemption_adds_the_gpu_hours_that_it_destroys_and_the_text_says_so():
    calm = predicted(8, 400)
    spot = predicted(8, 400, preempted_every_h=20 * UNIT_S / 3600, restart_s=60.0)
    assert spot.gpu_hours == pytest.approx(calm.gpu_hours / (1 - 0.5 / 20))
    assert "preempted" not in calm.text()
    line = next(line for line in spot.text().splitlines() if line.startswith("preempted"))
    assert "an actor lives 0.555556 h" in line
    assert line.endswith("each costs a restart of 60 s and 50 s of work")


def test_an_estimate_without_rows_takes_no_time():
    assert Estimate(0, 0, 8, SPEED, 0, 0, 1.0, 2.5, "", preempted_every_h=1.0, restart_s=300.0).seconds == 0


def test_the_estimate_is_finite_if_actors_die_faster_than_they_finish_a_unit():
    assert predicted(8, 400, preempted_every_h=UNIT_S / 7200, restart_s=300.0).seconds < 20 * predicted(8, 400).seconds
