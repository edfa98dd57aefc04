"""Compute the figures of the report from an output's counts and a sample of its rows. Pure.

They follow the argument of the CapsFusion paper: raw captions hold knowledge but are badly written, synthetic captions are
well written but hold little knowledge, and a good fused caption has both. So the figures compare all three.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from capsfusion_ray.config import ClusterConfig
from capsfusion_ray.core.gates.entities import is_entity
from capsfusion_ray.core.word_alignment import Origin, align_words
from capsfusion_ray.core.word_keys import Words, source_words
from capsfusion_ray.reports.sample import Row, State

LONGEST_BAR = 60  # words; the last bar holds all longer captions
BAR_WORDS = 3
DIVERSITY_POINTS = 20


def figures(state: State, written: Sequence[Row], price_per_gpu_hour: float | None) -> dict[str, Any]:
    """Return all figures of the page as plain JSON values. `written` are sampled rows of data/."""
    counts = asdict(state.counts)
    sides = {
        "raw": [source_words(row.raw) for row in written],
        "synthetic": [source_words(row.synthetic) for row in written],
        "fused": [source_words(row.fused) for row in written],
    }
    return {
        "finished": state.finished,
        "counts": state.counts.rows,
        "reasons": counts["reasons"],
        "flags": counts["flags"],
        "filtered_by": counts["filtered_by"],
        "unreadable_shards": state.unreadable_shards,
        "revisions": list(state.revisions),
        "base": {key: str(value) for key, value in state.base.items() if key != "prompt"},
        "prompt": str(state.base.get("prompt", "")),
        "speed": _speed(state, price_per_gpu_hour),
        "measured": len(written),
        "lengths": {name: _lengths(words) for name, words in sides.items()},
        "diversity": {name: _diversity(words) for name, words in sides.items()},
        "knowledge": {name: _knowledge(sides["raw"], sides[name]) for name in ("synthetic", "fused")},
        "origins": _origins(written, sides),
    }


def _speed(state: State, price_per_gpu_hour: float | None) -> dict[str, Any]:
    """Return captions/s, the estimated time left as it was over time, and the cost of a million captions.

    While the output is running, the speed is that of the last minutes. For a finished output it is the speed per actor
    over the whole run. The cost is computed from the time that the engines were busy, in all processes of the run, not
    from the actors that were requested. The price of a GPU is used only if a GPU computed.
    """
    progress = state.progress
    price = next(
        (p for p in (price_per_gpu_hour, state.cost["usd_per_gpu_hour"]) if p is not None),
        ClusterConfig.price_per_gpu_hour,
    )
    on_gpu = state.base.get("engine.kind") != "api" and any(
        not device.endswith((":cpu", ":none")) for device in state.devices
    )
    gpus = (1.0 if state.cost["gpus_per_actor"] is None else state.cost["gpus_per_actor"]) if on_gpu else 0.0
    history = progress.get("history", [])
    rate = progress.get("captions_per_s") or 0.0
    counts = state.counts
    # Rows that a takedown removed were written, too.
    worked = (counts.fused + counts.kept + counts.rejected + counts.removed) / state.busy_s if state.busy_s else 0.0
    over_all = state.finished and worked > 0
    actor_hours = 1e6 / worked / 3600 if worked else None
    return {
        "history": history,
        "eta_history": [
            (seconds, round((state.counts.planned - rows) / rate, 1)) for seconds, rows, rate in history if rate
        ],
        "captions_per_s": worked if over_all else rate,
        "unit": "captions/s per actor" if over_all else "captions/s",
        "eta_s": progress.get("eta_s"),
        "actors": progress.get("actors", 0),
        "updated_at": progress.get("updated_at", ""),
        "devices": state.devices,
        "actor_hours_per_million": actor_hours,
        "usd_per_million": actor_hours * gpus * price if actor_hours and gpus else None,
        "usd_per_gpu_hour": price,
        "prompt_tokens": state.counts.prompt_tokens,
        "output_tokens": state.counts.output_tokens,
    }


def _lengths(captions: Sequence[Words]) -> dict[str, Any]:
    lengths = sorted(len(caption.words) for caption in captions)
    bars = [0] * (LONGEST_BAR // BAR_WORDS + 1)
    for length in lengths:
        bars[min(length, LONGEST_BAR) // BAR_WORDS] += 1
    if not lengths:
        return {"mean": 0.0, "median": 0, "p95": 0, "bars": bars}
    at = len(lengths)
    mean = sum(lengths) / at
    return {
        "mean": round(mean, 1),
        "median": lengths[at // 2],
        "p95": lengths[min(at - 1, at * 95 // 100)],
        "bars": bars,
    }


def _diversity(captions: Sequence[Words]) -> list[tuple[int, int]]:
    """Return points (number of captions, distinct trigrams among them). The curve flattens where captions repeat phrases."""
    seen: set[tuple[str, ...]] = set()
    points = []
    every = max(len(captions) // DIVERSITY_POINTS, 1)
    for number, caption in enumerate(captions, 1):
        keys = caption.keys
        seen.update(zip(keys, keys[1:], keys[2:], strict=False))
        if number % every == 0 or number == len(captions):
            points.append((number, len(seen)))
    return points


def _knowledge(raws: Sequence[Words], captions: Sequence[Words]) -> float | None:
    """Return the share of the raw captions' names and numbers that the other captions mention; None if there are none."""
    kept = total = 0
    for raw, caption in zip(raws, captions, strict=True):
        entities = {key: word for word, key in zip(raw.words, raw.keys, strict=True) if is_entity(word, key)}
        total += len(entities)
        kept += sum(caption.holds(word, key) for key, word in entities.items())
    return round(kept / total, 4) if total else None


def _origins(rows: Sequence[Row], sides: dict[str, list[Words]]) -> dict[str, float]:
    """Return the share of the fused captions' words by where they come from."""
    found: Counter[Origin] = Counter()
    for row, raw, synthetic in zip(rows, sides["raw"], sides["synthetic"], strict=True):
        found.update(span.origin for span in align_words(row.fused, raw, synthetic))
    total = sum(found.values())
    return {str(origin): round(found[origin] / total, 4) if total else 0.0 for origin in Origin}
