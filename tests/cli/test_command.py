"""The command: its jobs, its help, its exit codes. What a job does is tested where the job is."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from echo_run import finished

from capsfusion_ray import __version__
from capsfusion_ray.cli import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, JOBS, main, run_job
from capsfusion_ray.config import VerifyConfig
from capsfusion_ray.errors import ConfigError, StorageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("words", [["--help"], ["--version"], []])
def test_help_and_version_are_quick_and_load_neither_ray_nor_torch(words):
    look = (
        "import sys, time; from capsfusion_ray.cli import main; code = main(sys.argv[1:]); "
        "assert not {'ray', 'torch', 'pyarrow', 'omegaconf'} & sys.modules.keys(); "
        "print(time.process_time()); sys.exit(code)"  # CPU time of the process: it does not depend on what else runs here
    )
    ran = subprocess.run([sys.executable, "-c", look, *words], capture_output=True, text=True, check=True)
    assert (f"capsfusion-ray {__version__}" if words == ["--version"] else "capsfusion <job>") in ran.stdout
    assert float(ran.stdout.splitlines()[-1]) < 0.5


def test_the_module_is_the_command():
    ran = subprocess.run(
        [sys.executable, "-m", "capsfusion_ray", "--version"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == f"capsfusion-ray {__version__}"


def test_help_lists_every_job_on_one_line(capsys):
    assert main(["--help"]) == EXIT_DONE
    listed = re.findall(r"^  (\w+) +\S", capsys.readouterr().out, re.MULTILINE)
    assert listed == list(JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_the_help_of_a_job_says_what_it_does_and_lists_its_keys(name, capsys):
    assert main([name, "--help"]) == EXIT_DONE
    said = capsys.readouterr().out
    assert JOBS[name].does in said
    assert said.startswith(f"capsfusion {name} ")
    assert re.search(r"^  [a-z_.]+=\S* +\(", said, re.MULTILINE)


def test_every_file_of_jobs_is_a_job_of_the_command():
    files = {path.stem for path in (ROOT / "jobs").glob("*.py")}
    assert files == set(JOBS) - {"submit"}, "a job that submits is not itself submitted"
    for name in files:
        assert f'main(["{name}", *sys.argv[1:]])' in (ROOT / f"jobs/{name}.py").read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "near"), [("fuze", "fuse"), ("verfy", "verify"), ("xyzzy", "choose one of fuse, plan")]
)
def test_an_unknown_job_names_the_nearest(name, near, capsys):
    assert main([name, "output.path=o"]) == EXIT_USAGE
    said = capsys.readouterr()
    assert near in said.err
    assert not said.out


def test_the_last_line_on_stdout_is_the_result_and_logs_go_to_stderr(tmp_path, capsys):
    finished(tmp_path)
    assert main(["verify", f"output.path={tmp_path / 'out'}", "deep=true"]) == EXIT_DONE
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["rows"]["planned"] == 24


def test_people_at_a_terminal_get_lines_before_the_json(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    result = {"rows": {"planned": 12000, "kept": 0}, "rejects": {}, "verified": True, "report": None, "output": "out"}
    assert run_job(VerifyConfig, lambda cfg: result, ["output.path=o"]) == EXIT_DONE
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["rows", "planned", "12,000"], ["verified", "True"], ["output", "out"]]
    assert json.loads(last) == result


def test_show_prints_captions_for_people(tmp_path, capsys):
    finished(tmp_path)
    assert main(["show", f"output.path={tmp_path / 'out'}", "count=2"]) == EXIT_DONE
    assert "Rows by outcome" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (ConfigError("deep=7: must be true or false"), EXIT_USAGE, "error: deep=7"),
        (StorageError("s3://b: gone"), EXIT_FAILED, "failed: s3://b: gone"),
        (KeyboardInterrupt(), EXIT_FAILED, "interrupted; "),
    ],
)
def test_an_error_is_one_line_on_stderr_and_its_exit_code(raised, code, said, capsys):
    def call(cfg):
        raise raised

    assert run_job(VerifyConfig, call, ["output.path=o"]) == code
    out, err = capsys.readouterr()
    assert err.startswith(said)
    assert not out


@pytest.mark.parametrize(
    "words", [[], ["fuse", "output.storage.secret=x"], ["address=http://127.0.0.1:1", "adress=x", "fuse"]]
)
def test_submit_refuses_a_missing_job_a_secret_and_a_wrong_key_before_it_asks_a_cluster(words, capsys):
    assert main(["submit", *words]) == EXIT_USAGE
    assert capsys.readouterr().err.startswith("error: ")


def test_the_help_of_a_submitted_job_is_the_help_of_that_job(capsys):
    assert main(["submit", "verify", "--help"]) == EXIT_DONE
    assert capsys.readouterr().out.startswith("capsfusion verify ")


@pytest.mark.parametrize("name", sorted(JOBS))
def test_the_help_of_a_job_needs_no_optional_package(name):
    """As after a plain `pip install`: `train --help` ended with an error where matplotlib is an optional package."""
    blocked = ("matplotlib", "sacrebleu", "vllm", "numba", "datasets")
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); from capsfusion_ray.cli import main"
    code = f"{block}; sys.exit(main([{name!r}, '--help']))"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert asked.returncode == 0, asked.stderr[-2000:]
    assert f"capsfusion {name}" in asked.stdout
