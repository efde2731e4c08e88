"""governor.service on a plain host that runs containerd, with all that it is denied there."""

from pathlib import Path

import pytest
from conftest import ROOT, checked, sh
from governed_node import POLICIES, Node, is_saved
from test_systemd import UNITS, log, shown

from governor import instance, pins

UNIT = ROOT / "scripts/k8s/governor.service"


class Service:
    """As DaemonSet, for a test's Node."""

    def __init__(self, policies):
        policies.mkdir(parents=True)
        for name, text in POLICIES.items():
            (policies / f"{name}.toml").write_text(text)
        (UNITS / UNIT.name).write_text(UNIT.read_text().replace("--dry-run ", ""))
        checked("systemctl", "daemon-reload")
        checked("systemctl", "start", UNIT.name)

    @property
    def pids(self):
        return [int(shown(UNIT.name, "MainPID"))]

    def log(self):
        return log(UNIT.name)

    def close(self):
        sh("systemctl", "stop", UNIT.name)
        (UNITS / UNIT.name).unlink()


@pytest.fixture
def node(containerd, tmp_path, installed):
    made = Node(tmp_path, Service(Path("/etc/governor/policies")), Path("/var/lib/governor"))
    yield made
    made.close()


def test_it_saves_a_container_with_what_it_is_allowed(node, tmp_path):
    pod = node.pod("agents", 128, "touch", "--rate-mb", "8")
    node.protects(pod)
    is_saved(node, pod, tmp_path)
    print(sh("systemd-analyze", "security", "--no-pager", UNIT.name).stdout)
    checked("systemctl", "stop", UNIT.name)
    assert (shown(UNIT.name, "Result"), shown(UNIT.name, "NRestarts")) == ("success", "0")
    assert pins.current("node") is None
    assert not instance.knob_file("node").exists()
