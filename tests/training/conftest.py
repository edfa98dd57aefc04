"""Triples of our own writing, enough to train a tokenizer and a toy model on."""

import json
import random

import pytest

NAMES = (
    "Anna Berg",
    "Porsche 911",
    "Lake Como",
    "Mihály Nagy",
    "Studio 54",
    "Todd-Snyder",
    "NASA",
    "iPhone 6s",
    "O'Neill",
)
THINGS = (
    "wooden chair",
    "leather jacket",
    "old bridge",
    "racing car",
    "summer dress",
    "coffee mug",
    "city map",
    "guitar",
)
PLACES = ("in the garden", "on a table", "at the fair", "near the harbour", "on a white background")


@pytest.fixture(scope="session")
def rows():
    rng = random.Random(7)
    made = []
    for i in range(240):
        name, thing, place, year = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES), rng.randint(1950, 2024)
        raw = f"{name} {thing.title()} ({year}) #{i}" if i % 2 else f"{thing.upper()} by {name} - {year}"
        synthetic = f"A {thing} is shown {place}."
        fused = f"A {thing} by {name} from {year} is shown {place}."
        made.append({"laion_2b": raw, "laion_coco": synthetic, "capsfuion_official": fused})
    return made


@pytest.fixture(scope="session")
def triples_file(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("triples") / "triples.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path
