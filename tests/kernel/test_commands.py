"""load, unload, doctor, watch and the loader's edges, on a real kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import INSTANCE, Guard, in_a_fork

from governor import pins, record


def governor(*arguments, status=0, **options):
    command = ["governor", *map(str, arguments)]
    options = options or {"preexec_fn": in_a_fork(command)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_doctor_tries_for_real():
    told = json.loads(governor("doctor", "--json").stdout)
    assert told["verdict"]["source"] == "bpf"
    assert told["facts"]["loaded"] == {"charge": "fentry", "stall": "fentry", "victim": "fentry"}
    assert not any(name.startswith("doctor") for name in pins.instances())


@pytest.mark.any_kernel
def test_doctor_without_rights_says_what_is_missing():
    done = governor(
        "doctor", status=0, user=65534, env={"PATH": "/usr/local/bin:/usr/bin", "PYTHONPATH": "/work:/opt/deps"}
    )
    assert "no right to load BPF programs" in done.stdout
    assert "source: poll" in done.stdout
    assert "brake: stop" in done.stdout


def test_kprobes_where_fentry_cannot_be_had(container, tmp_path):
    """The same guard over programs attached by kprobe; pins of another version are replaced first."""
    stale = pins.INSTANCES / "kp" / "0123456789ab" / "charge"
    stale.mkdir(parents=True)
    assert (
        json.loads(governor("load", "--instance", "kp", "--attach", "kprobe", "--json").stdout)["modules"]["charge"]
        == "kprobe"
    )
    assert not stale.exists()
    pod = container(64)
    agent = pod.agent(tmp_path / "session.jsonl", "touch")
    guard = Guard(tmp_path, pod, "--instance", "kp", loaded=False)
    try:
        assert "kprobe" in guard.ready().await_line("protecting")["text"]
        agent.go()
        assert agent.wait(timeout=60) in (143, -9)
        assert guard.lines("archived")
        assert pod.events()["oom_kill"] == 0
    finally:
        guard.stop()
    governor("unload", "--instance", "kp")
    assert "kp" not in pins.instances()
    assert "found no instance 'kp'" in governor("unload", "--instance", "kp", status=1).stderr


@pytest.mark.any_kernel
def test_a_wrong_bcc_is_named(tmp_path):
    (tmp_path / "bcc.py").write_text("")
    done = governor(
        "load",
        "--instance",
        "wrong",
        status=1,
        env={"PATH": "/usr/local/bin:/usr/bin", "PYTHONPATH": f"{tmp_path}:/work:/opt/deps"},
    )
    assert f"another project named bcc at {tmp_path}/bcc.py" in done.stderr
    assert "python3-bpfcc" in done.stderr


def test_the_verifier_is_quoted_when_it_refuses(monkeypatch, tmp_path):
    import shutil

    from governor import loader

    copied = tmp_path / "bpf"
    shutil.copytree(pins.sources(), copied)
    source = copied / "charge.bpf.c"
    source.write_text(source.read_text().replace("if (!c || !is_read(c, now))", "if (!is_read(c, now))"))
    monkeypatch.setattr(pins, "sources", lambda: copied)
    with pytest.raises(loader.LoadError, match=r"charge\.bpf\.c \(fentry\)"):
        loader.load("refused", "fentry")
    assert "refused" not in pins.instances()


def test_stalls_are_what_psi_says(container, guard, tmp_path, loaded):
    """One thread that reads more than fits: its stalls, summed in BPF, beside memory.pressure."""
    pod = container(64)
    large = tmp_path / "large"
    subprocess.run(["dd", "if=/dev/urandom", f"of={large}", "bs=1M", "count=200"], check=True, capture_output=True)
    os.sync()  # dirty pages are not dropped
    Path("/proc/sys/vm/drop_caches").write_text("3")
    pod.agent(tmp_path / "session.jsonl", "none")
    running = guard(pod).ready()
    code = "import sys; f = open(sys.argv[1], 'rb', 0)\nfor _ in range(4):\n f.seek(0)\n while f.read(1 << 16): pass"
    before = psi_total_usec(pod)
    assert pod.start(sys.executable, "-c", code, large).wait(timeout=200) == 0
    psi_usec = psi_total_usec(pod) - before
    from governor import bpflib

    track = bpflib.PinnedMap(bpflib.open_libbpf(), f"{pins.current(INSTANCE)}/stall/track")
    value = track.lookup(record.CGROUP_ID.pack(pod.path.stat().st_ino), record.TRACK.size)
    bpf_usec = record.stall_ns(value) / 1000
    print(f"stalled {bpf_usec:.0f} us by BPF, {psi_usec} us by PSI")
    assert psi_usec > 10_000
    assert 0.5 < bpf_usec / psi_usec < 2.0
    assert running.lines("archived", "terminating") == []


def psi_total_usec(pod):
    return int(pod.read("memory.pressure").splitlines()[0].rpartition("=")[2])


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["guard", "--cgroup", "/nowhere"], "found no memcg at /nowhere"),
        (["guard", "--cgroup", "/sys/fs/cgroup"], "found no memcg"),
        (["guard", "--cgroup", "POD", "--pid", "1"], "process 1 is in /sys/fs/cgroup, expected it in"),
        (["guard", "--cgroup", "POD", "--pid", "999999"], "found no process 999999"),
        (["guard", "--cgroup", "POD", "--archive", "x/*"], "expected one that begins with / or ~/"),
        (["guard", "--cgroup", "POD", "--instance", "../x"], "found instance name '../x'"),
        (["guard", "--cgroup", "POD", "--source", "x"], "expected auto, bpf, psi or poll"),
        (["load", "--attach", "magic"], "expected auto, fentry or kprobe"),
        (["watch", "/nowhere"], "found no memcg"),
    ],
)
def test_wrong_use_is_answered(container, arguments, expected):
    pod = container(64)
    words = [str(pod.path) if a == "POD" else a for a in arguments]
    assert expected in governor(*words, status=2).stderr.replace("\n", " ")
