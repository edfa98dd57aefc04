"""Check that scoring `reference` writes the same tokens as transformers 4.28.1 on real pairs. Needs an environment with it.

    python benchmarks/check_reference.py --python /some/where/bin/python --pairs ../shared/data/capsfusion_pairs_8000.json

How to make the environment: tests/fixtures/record_4_28_1.py, which is what runs there: the embedded model in float32, the
reference's settings (3 beams, 80 new tokens, prompts padded to 256). Nothing is recorded. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import tempfile
from pathlib import Path

from hf import Ids, build_prompts, read_pairs

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.engines.beam.engine import BeamEngine
from capsfusion_ray.engines.loading import load_model
from capsfusion_ray.models.inspect import inspect_model, resolve_with_model

RECORDER = Path(__file__).resolve().parents[1] / "tests/fixtures/record_4_28_1.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment with transformers 4.28.1")
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--rows", type=int, default=300)
    args = parser.parse_args()
    engine = EngineConfig(device="cpu", dtype="float32")
    info = inspect_model(engine)
    engine, _ = resolve_with_model(engine, DecodeConfig(), info)
    loaded = load_model(engine)
    prompts = build_prompts(loaded, read_pairs(args.pairs, args.rows), info.template, engine.max_prompt_tokens)
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "prompts.json"), Path(folder, "answers.json")
        asked.write_text(json.dumps([list(p.prefix_ids + p.suffix_ids) for p in prompts]))
        subprocess.run([args.python, str(RECORDER), str(asked), str(answered)], check=True)
        want = json.loads(answered.read_text())["demo"]["outputs"]
    decode = DecodeConfig(num_beams=3, max_new_tokens=80, scoring="reference")
    beam = BeamEngine(dataclasses.replace(loaded, tokenizer=Ids()), engine, decode)
    beam.submit(prompts)
    written: dict[str, list[int]] = {}
    while beam.unfinished:
        written |= {g.id: [int(token) for token in g.text.split()] for g in beam.step()}
    same = sum(written[p.id] == ids for p, ids in zip(prompts, want, strict=True))
    print(json.dumps({"rows": len(prompts), "same_as_transformers_4_28_1": same}))


if __name__ == "__main__":
    main()
