"""Facts, and one case for each that is missing."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from governor import cli, probe

GOOD = probe.Facts(
    kernel="6.1.0",
    cgroup2=True,
    cgroup1_memory=False,
    memory_controller=True,
    cgroup_writable=True,
    freezer=True,
    cgroup_kill=True,
    psi=True,
    btf=True,
    bpffs=True,
    libbpf=True,
    bcc="ok",
    headers="/lib/modules/6.1.0/build",
    capabilities=(1 << 41) - 1,
    perf_event_paranoid=3,
    locked_memory=False,
    memory_bytes=1 << 34,
    swap_bytes=0,
)


def test_everything_there_is_bpf():
    verdict = probe.decide(GOOD)
    assert (verdict.source, verdict.brake, verdict.missing) == ("bpf", "freeze", [])


@pytest.mark.parametrize(
    ("change", "source", "brake", "told"),
    [
        ({"cgroup2": False}, "none", "none", "systemd.unified_cgroup_hierarchy=1"),
        ({"cgroup2": False, "cgroup1_memory": True}, "poll", "stop", "systemd.unified_cgroup_hierarchy=1"),
        ({"memory_controller": False}, "none", "none", "cgroup_disable=memory"),
        ({"cgroup_writable": False}, "bpf", "stop", "delegated"),
        ({"cgroup_writable": False, "btf": False}, "poll", "stop", "delegated"),
        ({"psi": False, "btf": False}, "poll", "freeze", "CONFIG_DEBUG_INFO_BTF"),
        ({"freezer": False}, "bpf", "stop", "cgroup.freeze"),
        ({"btf": False}, "psi", "freeze", "CONFIG_DEBUG_INFO_BTF"),
        ({"bpffs": False}, "psi", "freeze", "mount -t bpf"),
        ({"libbpf": False}, "psi", "freeze", "apt-get install libbpf1"),
        ({"bcc": "missing"}, "psi", "freeze", "apt-get install python3-bpfcc"),
        ({"bcc": "/x/bcc/__init__.py"}, "psi", "freeze", "the bcc at /x/bcc/__init__.py is another project"),
        ({"headers": ""}, "psi", "freeze", "linux-headers-6.1.0"),
        ({"capabilities": 0}, "psi", "freeze", "CAP_BPF and CAP_PERFMON"),
        ({"loaded": {"error": "verifier"}}, "psi", "freeze", "the programs do not load: verifier"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(change, source, brake, told):
    verdict = probe.decide(dataclasses.replace(GOOD, **change))
    assert (verdict.source, verdict.brake) == (source, brake)
    assert [line for line in verdict.missing if told in line]


def test_all_that_is_missing_is_named_at_once():
    assert len(probe.decide(dataclasses.replace(GOOD, btf=False, bpffs=False, bcc="missing")).missing) == 3


@pytest.mark.parametrize(
    ("bits", "allowed"), [((21,), True), ((38, 39), True), ((39,), False), ((38,), False), ((), False)]
)
def test_the_rights_that_bpf_needs(bits, allowed):
    assert probe.has_bpf_capabilities(sum(1 << bit for bit in bits)) is allowed


def test_an_optional_module_that_is_missing_is_no_obstacle():
    loaded = {"charge": "kprobe", "stall": "unavailable: no fentry", "victim": "fentry"}
    verdict = probe.decide(dataclasses.replace(GOOD, loaded=loaded))
    assert verdict.source == "bpf"
    assert "attach by kprobe" in verdict.reason
    assert verdict.missing == ["stall: unavailable: no fentry"]


@pytest.mark.parametrize(("facts", "status"), [(GOOD, 0), (dataclasses.replace(GOOD, cgroup2=False), 1)])
def test_doctor_tells_both_people_and_programs(monkeypatch, facts, status):
    monkeypatch.setattr(probe, "probe", lambda: facts)
    monkeypatch.setattr(probe, "try_load", lambda: {"charge": "fentry"})
    told = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert told.exit_code == status
    assert json.loads(told.stdout)["verdict"]["source"] == ("none" if status else "bpf")
    plain = CliRunner().invoke(cli.app, ["doctor"])
    assert plain.exit_code == status
    assert f"source: {'none' if status else 'bpf'}" in plain.stdout


def test_doctor_says_what_it_could_not_look_at(monkeypatch):
    facts = dataclasses.replace(GOOD, freezer=None, cgroup_kill=None)
    monkeypatch.setattr(probe, "probe", lambda: facts)
    lines = CliRunner().invoke(cli.app, ["doctor", "--quick"]).stdout.splitlines()
    unknown = [line.split()[0] for line in lines if line.endswith("not known: there is no memcg to look at")]
    assert unknown == ["freezer", "cgroup_kill"]


def test_probing_this_machine_raises_nothing():
    facts = probe.probe()
    assert facts.kernel
    assert probe.decide(facts).source in ("bpf", "psi", "poll", "none")
