"""A missing optional package is one error that names the extra."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from capsfusion_ray.config.extras import imports_of
from capsfusion_ray.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_a_failed_import_names_the_package_and_the_command_that_installs_it():
    with (
        pytest.raises(ConfigError, match=r"no_such_package.*pip install 'capsfusion-ray\[train\]'"),
        imports_of("train"),
    ):
        import no_such_package  # noqa: F401


@pytest.mark.parametrize(
    ("missing", "words", "extra"),
    [
        ("matplotlib", ["train", "data.path=x", "output.path=y"], "train"),
        (
            "sacrebleu",
            [
                "evaluate",
                "data.path={triples}",
                "data.raw=a",
                "data.synthetic=b",
                "data.reference=c",
                "engine.kind=echo",
            ],
            "evaluate",
        ),
    ],
)
def test_a_job_without_its_package_ends_with_exit_code_2(missing, words, extra, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"a": "x y", "b": "z", "c": "x z"}\n')
    words = [word.format(triples=tmp_path / "t.jsonl") for word in words]
    hide = f"import sys; sys.modules[{missing!r}] = None; from capsfusion_ray.cli import main; sys.exit(main(sys.argv[1:]))"
    ran = subprocess.run([sys.executable, "-c", hide, *words], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, f"pip install 'capsfusion-ray[{extra}]'" in ran.stderr) == (2, True), ran.stderr
    assert any(requirement.startswith(missing) for requirement in EXTRAS[extra])
