"""`governor off`. The last file: it takes the programs away from under all others."""

import subprocess

import pytest
from test_crashes import held, is_released

from governor import pins

pytestmark = pytest.mark.any_kernel


def test_off_thaws_restores_and_detaches(container, guard, tmp_path):
    pod = container(256)
    policy = tmp_path / "policy.toml"
    policy.write_text("[terminate]\nenabled = false\n")  # who ended it is no question then
    governor, agent = held(pod, guard, tmp_path, "--policy", policy)
    done = subprocess.run(["governor", "off"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert f"stopped process {governor.process.pid}" in done.stdout
    assert is_released(pod)
    assert agent.poll() is None
    assert pins.instances() == []
    assert governor.process.wait(timeout=20) == 0
    assert "nothing was on" in subprocess.check_output(["governor", "off"], text=True)
