"""The tests that need a GPU can be collected on a machine without Ray and without the packages of the object stores."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MISSING = ("ray", "moto", "boto3", "botocore", "aiobotocore", "s3fs", "vllm")
# Python imports sitecustomize when it starts. This one makes the imports of MISSING fail.
SITECUSTOMIZE = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked by the test)", name=name)
sys.meta_path.insert(0, Block())
"""


def test_gpu_tests_are_collected_without_ray_and_s3(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    assert subprocess.run([sys.executable, "-c", "import ray"], env=env, capture_output=True).returncode == 1
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider", "tests/engines"]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "test_on_a_gpu_captions_are_those_of_transformers_there" in ran.stdout
