"""Measure how the figures of a fusion model grow with its size and with the number of triples that it is trained on.

    python benchmarks/model_curve.py --triples FILE.json --work DIR [--steps 4200] [--threads 1] [--json FILE]

Each point is a supervised training from scratch with conf/train/tiny.yaml and --steps steps, and an evaluation on the last 500
triples, which no training sees, with the same decoding for all. SIZES are trained on all other triples. SHARES of these train
the middle size, which did not learn to copy in 1,000 steps, but did in 2,500. Each point is kept in DIR, so a killed
run can be resumed. Many hours on a CPU; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from processes import end_with_children, said_by, tell

HELD_OUT = 500
SIZES = {  # hidden, heads, ffn; six layers each
    "1.7M": (128, 4, 352),
    "3.5M": (192, 6, 528),
    "5.9M": (256, 8, 704),
    "11.8M": (384, 12, 960),
}
MIDDLE = "3.5M"
SHARES = (1 / 8, 1 / 4, 1 / 2, 1)
TIMEOUT_S = 24 * 3600.0
SHOWN = (
    "validation_loss",
    "rouge_l",
    "bleu_4",
    "cider",
    "capitalised_kept",
    "numbers_kept",
    "repeated_trigram",
    "pasted",
    "words",
)


def subset(triples: list[Any], share: float, folder: Path) -> tuple[Path, int]:
    """A file of the first triples and the held-out ones, and how many train."""
    n = round((len(triples) - HELD_OUT) * share)
    file = folder / f"triples-{n}.json"
    if not file.exists():
        file.write_text(json.dumps(triples[:n] + triples[-HELD_OUT:]))
    return file, n


def point(size: str, file: Path, folder: Path, steps: int, threads: int) -> dict[str, Any]:
    hidden, heads, ffn = SIZES[size]
    model, data = folder / "model", f"data.path={file}"
    trained, figures = folder / "trained.json", folder / "figures.json"
    if not trained.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shape = [f"model.hidden={hidden}", f"model.heads={heads}", f"model.ffn={ffn}", "model.layers=6"]
        # The copy curriculum and the decay keep about their shares of the recipe's 4,200 steps.
        schedule = [
            f"optim.steps={steps}",
            f"optim.decay_steps={steps * 3 // 10}",
            f"augment.copy_only_steps={steps // 10}",
            f"augment.copy_fade_steps={steps // 5}",
            f"output.validate_every={steps}",
            f"cluster.threads={threads}",
        ]
        command = [
            sys.executable,
            "jobs/train.py",
            "conf/train/tiny.yaml",
            data,
            f"output.path={model}",
            *shape,
            *schedule,
        ]
        said = said_by(command, folder / "log", TIMEOUT_S)
        trained.write_text(json.dumps(said))
    if not figures.exists():
        command = [sys.executable, "jobs/evaluate.py", data, f"data.rows={HELD_OUT}", f"engine.model={model}"]
        said_by([*command, f"output.path={folder}"], folder / "log", TIMEOUT_S)
    validation_loss = json.loads(trained.read_text())["validation_loss"]
    return {"validation_loss": validation_loss, **json.loads(figures.read_text())["figures"]["model"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--triples", type=Path, required=True, help="the published examples, a JSON array")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="of the triples, for the middle size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = options.sizes.split(",")
    if unknown := [size for size in sizes if size not in SIZES]:
        parser.error(f"--sizes {','.join(unknown)}: there are {', '.join(SIZES)}")
    end_with_children()
    triples, work = json.loads(options.triples.read_text(encoding="utf-8")), options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    points = [(MIDDLE, share) for share in map(float, options.shares.split(","))] + [
        (size, 1) for size in sizes if size != MIDDLE
    ]
    rows = []
    for size, share in points:
        file, n = subset(triples, share, work)
        rows.append(
            {
                "size": size,
                "triples": n,
                **point(size, file, work / f"{size}-{n}-{options.steps}", options.steps, options.threads),
            }
        )
        cells = [f"{rows[-1][name]:.3f}" for name in SHOWN]
        print(f"| {size}, {n:,} | {' | '.join(cells)} |", file=sys.stderr, flush=True)
    tell({"steps": options.steps, "points": rows}, options.json)


if __name__ == "__main__":
    main()
