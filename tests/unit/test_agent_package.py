"""governor.agent alone: what it imports, what it needs, and that it is whole without the rest of governor."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import governor.agent

PACKAGE = Path(governor.agent.__file__).parent
IMPORTED = "import json, sys; before = set(sys.modules); {}; print(json.dumps(sorted(set(sys.modules) - before)))"


def imported_by(code, directory=PACKAGE.parent.parent):
    ran = subprocess.run(
        [sys.executable, "-P", "-c", IMPORTED.format(code)],
        capture_output=True,
        text=True,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory)},
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def foreign(modules):
    """What is neither the standard library's nor governor.agent's."""
    ours = ("governor", "governor.agent")
    tops = {name.partition(".")[0] for name in modules if name not in ours and not name.startswith("governor.agent.")}
    return {top for top in tops if top not in sys.stdlib_module_names} | {
        name for name in modules if name.startswith("governor.") and not name.startswith("governor.agent")
    }


def test_importing_it_imports_nothing_yet():
    assert set(imported_by("import governor.agent")) == {"__future__", "governor", "governor.agent"}


@pytest.mark.parametrize("name", governor.agent.__all__)
def test_every_name_comes_with_the_standard_library_and_psutil_alone(name):
    assert foreign(imported_by(f"from governor.agent import {name}")) <= {"psutil"}


def test_the_names_are_all_there():
    for name in governor.agent.__all__:
        assert name in dir(governor.agent)
        assert getattr(governor.agent, name).__module__.startswith("governor.agent.")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        governor.agent.nothing  # noqa: B018


def test_it_works_without_the_rest_of_governor(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "governor" / "agent", ignore=shutil.ignore_patterns("__pycache__"))
    names = ", ".join(governor.agent.__all__)
    code = f"from governor.agent import {names}; reading = MemoryPressure().look(); assert reading.max_bytes > 0"
    assert foreign(imported_by(code, tmp_path)) <= {"psutil"}
