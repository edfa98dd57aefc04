"""`import capsfusion_ray as cf` is quick and light, and has every name that it promises."""

import subprocess
import sys
from pathlib import Path

import capsfusion_ray as cf
from capsfusion_ray import errors

PACKAGE = Path(cf.__file__).parent


def test_the_import_loads_neither_ray_nor_torch_and_takes_less_than_0_3_s():
    look = (
        "import time; began = time.process_time(); import capsfusion_ray; took = time.process_time() - began; import sys; "
        "assert not {'ray', 'torch', 'transformers', 'pyarrow'} & sys.modules.keys(); print(took)"
    )
    took = min(
        float(subprocess.run([sys.executable, "-c", look], capture_output=True, check=True).stdout) for _ in range(3)
    )
    assert took < 0.3


def test_every_public_name_is_there_and_has_a_docstring():
    for name in cf.__all__:
        assert name in dir(cf)
        assert name == "__version__" or getattr(cf, name).__doc__, name


def test_a_function_is_not_replaced_by_a_folder_of_the_package_that_is_imported_later():
    folders = {path.name for path in PACKAGE.iterdir()} | {path.stem for path in PACKAGE.glob("*.py")}
    assert not folders & set(cf.__all__)


def test_every_error_of_the_package_is_a_public_name():
    raised = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert [getattr(cf, name) for name in raised] == [getattr(errors, name) for name in raised]


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(cf, "fusee")


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()
    promised = set(cf.__all__) - {"__version__"}
    declared = {line.split(" as ")[-1].strip(" ,\n") for line in _declarations() if " as " in line}
    assert declared == promised, "what type checkers see is what the module has"


def _declarations():
    """The names of the block that only type checkers read, one per line."""
    text = (PACKAGE / "__init__.py").read_text("utf-8").partition("if TYPE_CHECKING:")[2]
    return [part for line in text.splitlines() for part in line.split(" import ")[-1].split(",")]
