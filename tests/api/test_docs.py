"""Every Python block of docs/api.md runs, in order, in an empty folder; every public name is on the page or on a result."""

import dataclasses
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import capsfusion_ray as cf

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/api.md").read_text("utf-8")


def test_the_examples_run_in_order_without_ray(tmp_path):
    script = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
    script += "\nimport sys\nassert 'ray' not in sys.modules\n"
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "decode.num_beams: was 3, now 5" in ran.stdout
    assert "did you mean decode.num_beams" in ran.stdout


def test_every_function_and_error_is_on_the_page():
    results = {name for name in cf.__all__ if dataclasses.is_dataclass(getattr(cf, name))}
    named = set(re.findall(r"\bcf\.(\w+)", PAGE)) | set(re.findall(r"\b(\w+)\b", PAGE))
    assert set(cf.__all__) - results - named - {"Dataset", "Outcome", "Reason", "RowError", "__version__"} == set()
    assert not [name for name in re.findall(r"\bcf\.(\w+)", PAGE) if not hasattr(cf, name)]


def test_the_extras_are_those_of_the_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"capsfusion-ray\[(\w+)\]", PAGE)) == set(extras) - {"dev", "system"}
