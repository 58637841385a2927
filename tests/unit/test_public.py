"""The public names of the package."""

import inspect
import subprocess
import sys
from types import ModuleType

import fedloom


def test_the_public_names_are_sorted_and_complete():
    assert fedloom.__all__ == sorted(fedloom.__all__)
    public = {n for n in dir(fedloom) if not n.startswith("_") and n != "TYPE_CHECKING"}
    shown = {n for n in public if not isinstance(getattr(fedloom, n), ModuleType)}
    named = {n for n in fedloom.__all__ if not isinstance(getattr(fedloom, n), ModuleType)}
    assert shown == named - {"__version__"}
    assert not hasattr(fedloom, "nothing_of_that_name")


def test_every_public_object_is_documented():
    for name in fedloom.__all__:
        found = getattr(fedloom, name)
        if inspect.isclass(found) or callable(found):
            assert found.__doc__, name
            assert not found.__doc__.startswith(f"{name}("), f"{name} has only the docstring that Python made"


def test_all_errors_are_one_family():
    errors = [getattr(fedloom, name) for name in fedloom.__all__ if name.endswith("Error")]
    assert len(errors) >= 6
    assert all(issubclass(error, fedloom.FedloomError) for error in errors)
    assert issubclass(fedloom.ConfigError, fedloom.UsageError)
    assert not issubclass(fedloom.MethodError, fedloom.UsageError)


def test_importing_is_quiet_and_leaves_torch_alone():
    code = (
        "import torch; before = torch.get_default_dtype(), torch.get_num_threads(), torch.random.get_rng_state();"
        "import fedloom;"
        "assert before[:2] == (torch.get_default_dtype(), torch.get_num_threads());"
        "assert torch.equal(before[2], torch.random.get_rng_state())"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
