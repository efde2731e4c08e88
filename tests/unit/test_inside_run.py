"""Commands in a container that is hostile ground, by real namespaces: with what rights, and what they cannot do."""

import os
import select
import signal
import time
from pathlib import Path

import pytest

from governor import children, inside, inside_run, subtree
from governor.actions import commands, device_filter
from governor.poller import Poller
from tests.fakes import container as containers
from tests.waiting import wait_for

pytestmark = pytest.mark.skipif(bool(containers.why_none()), reason=f"no containers here: {containers.why_none()}")
SECOND = 1_000_000_000


@pytest.fixture
def container():
    made = containers.Container()
    yield made
    made.close()


class Run:
    """One command inside, on a poller as the loop has it."""

    def __init__(self, container, *argv, within_s=20, variables=None, prepare=bytes):
        self.poller = Poller()
        self.children = children.Children(self.poller)
        self.ended = []
        self.door = inside.door_to(container.pid, container.start_ticks)
        self._until_ns = time.monotonic_ns() + within_s * SECOND
        made = inside_run.start(self.door, argv, variables or {}, self._until_ns, "test", prepare)
        self.pid = made.pid
        self.children.start(made, self.ended.append)

    def turn(self):
        self.poller.wait(20_000_000)
        self.children.check_deadlines(time.monotonic_ns())

    def end(self):
        while not self.ended:
            self.turn()
        self.door.close()
        return self.ended[0]


def run(container, *argv, **options):
    return Run(container, *argv, **options).end()


def sh(container, script, **options):
    ended = run(container, "sh", "-c", script, **options)
    return ended, ended.output.decode(errors="replace")


def check_rights(output, uid):
    status = dict(line.split(":\t", 1) for line in output.splitlines() if ":\t" in line)
    assert status["Uid"] == status["Gid"] == "\t".join([str(uid)] * 4)
    assert set(status["Groups"].split()) == {"4242", str(uid)}
    capabilities = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    assert {status[name] for name in capabilities} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert len(status["NSpid"].split()) == 1
    assert {status[name] for name in ("SigBlk", "SigIgn")} == {"0" * 16}


@pytest.mark.parametrize("uid", [0, containers.AGENT_UID])
@pytest.mark.parametrize("users", [False, True])
def test_it_has_the_rights_of_the_process_and_no_capability(uid, users):
    made = containers.Container(uid=uid, users=users)
    try:
        ended = run(made, "cat", "/proc/self/status")
        assert ended.ok, ended.why
        check_rights(ended.output.decode(), uid)
        theirs = {name: os.readlink(f"/proc/{made.pid}/ns/{name}") for name in NAMESPACES}
        _, output = sh(made, "cd /proc/self/ns; for name in *; do echo $name $(readlink $name); done")
        entered = dict(line.split() for line in output.splitlines())
        assert {name: entered[name] for name in NAMESPACES} == theirs
        assert theirs["pid"] != os.readlink("/proc/self/ns/pid")
        assert (theirs["user"] != os.readlink("/proc/self/ns/user")) == users
    finally:
        made.close()


NAMESPACES = ("mnt", "pid", "net", "ipc", "uts", "cgroup", "user")


def test_it_has_nothing_of_ours(container, monkeypatch):
    monkeypatch.setenv("SECRET_OF_GOVERNOR", "x")
    with open("/etc/hostname") as kept:  # noqa: F841  open, as governor has many
        script = "env; echo fds $(ls /proc/self/fd); echo cwd $(pwd); ulimit -c; cat; tty"
        _, output = sh(container, script, variables={"GOVERNOR_AGENT_PID": "1234567", "GOVERNOR_TIER": "compact"})
    lines = output.splitlines()
    assert "SECRET_OF_GOVERNOR=x" not in lines
    assert {"WHERE=inside", "HOME=/home/agent", "GOVERNOR_AGENT_PID=1", "GOVERNOR_TIER=compact"} <= set(lines)
    assert "fds 0 1 2 3" in lines, "the last is that of ls itself"
    assert {"cwd /", "0", "not a tty"} <= set(lines)
    assert {name.partition("=")[0] for name in lines if "=" in name} <= {
        *("WHERE", "HOME", "PATH", "PWD", "OLDPWD", "_", "SHLVL", "GOVERNOR_AGENT_PID", "GOVERNOR_TIER")
    }


def test_its_last_priority_is_that_of_anybody(container):
    _, output = sh(container, "cut -d' ' -f19,41 /proc/self/stat; cat /proc/self/oom_score_adj")
    assert output.split()[:2] == [str(max(0, os.getpriority(os.PRIO_PROCESS, 0))), "0"]


@pytest.mark.parametrize("how", ["link", "script"])
def test_its_program_is_never_ours(container, how):
    """What CVE-2019-5736 did to runc: /proc/self/exe as the command, or as the interpreter of a script.

    As an interpreter it executes the script, which executes it, and so on until the deadline.
    """
    if how == "link":
        container.path("/tmp/exe").symlink_to("/proc/self/exe")
    else:
        container.write("/tmp/exe", b"#!/proc/self/exe\n").chmod(0o755)
    ended = run(container, "/tmp/exe", "-c", "print('an interpreter of ours')", within_s=2)
    assert not ended.ok and b"interpreter" not in ended.output
    with pytest.raises(OSError, match="Operation not permitted"):
        os.pwrite(inside_run.trampoline.open_trampoline(), b"\xcc", 120)


def test_a_program_with_set_user_id_stays_who_it_is(container):
    copied = container.write("/tmp/id", Path("/usr/bin/id").read_bytes(), uid=0)
    copied.chmod(0o6755)
    ended = run(container, "/tmp/id", "-u")
    assert ended.output == b"12345\n", ended.output


def test_a_flood_is_ended(container):
    ended = run(container, "yes")
    assert ended.flooded and len(ended.output) == 64 << 10


def test_it_sees_and_reaches_none_of_ours(container):
    script = "echo parent $PPID; echo x > /proc/$PPID/oom_score_adj; ls -d /proc/[0-9]* | wc -l"
    current = Run(container, "sh", "-c", f"exec 2>&1; {script}")
    output = current.end().output.decode()
    assert "parent 0\n" in output, "its parent is in no namespace that it knows"
    assert "/proc/0/oom_score_adj" in output
    assert int(output.split()[-1]) <= 4, "the container's first process, the shell, ls and wc"


def test_what_seccomp_forbids(container):
    for command in ("unshare --user true", "unshare --user --map-root-user --mount true", "nsenter -t 1 --net true"):
        ended, output = sh(container, command)
        assert not ended.ok and "Operation not permitted" in output, (command, output)
    ended, output = sh(
        container, "python3 -c 'import threading, os; threading.Thread(target=print).start(); os.fork()'"
    )
    assert ended.ok, "threads and forks are its own affair"


def test_a_target_that_ended_is_not_entered(container):
    door = inside.door_to(container.pid, container.start_ticks)
    container.end()
    made = inside_run.start(door, ("true",), {}, time.monotonic_ns() + SECOND, "test", bytes)
    select.select([made.pidfd], [], [], 5)
    assert made.end() == 1 and b"No such process" in made.output
    door.close()


def test_a_target_that_ends_meanwhile_takes_it_along(container):
    current = Run(container, "sh", "-c", "echo started; sleep 1000")
    while not current.children._running or b"started" not in next(iter(current.children._running.values()))[0].output:
        current.turn()
    container.end()
    ended = current.end()
    assert ended.status == 128 + signal.SIGKILL and not ended.over_deadline


def test_nothing_to_execute(container):
    ended = run(container, "no-such-program")
    assert ended.status == 127 and "found nothing to execute" in ended.why
    container.write("/tmp/odd", b"\x7fELF and no more").chmod(0o755)
    assert run(container, "/tmp/odd").status == 127


def test_without_a_memcg_of_its_own_it_does_not_run(container, tmp_path):
    door = inside.door_to(container.pid, container.start_ticks)
    with pytest.raises(OSError, match="needs a memcg of its own"):
        commands.Commands([str(tmp_path / "none")]).run(("true",), {}, 0, "test", door)
    door.close()


def unified():
    for line in Path("/proc/mounts").read_text().splitlines():
        if line.split()[2] == "cgroup2":
            return line.split()[1]
    return ""


@pytest.mark.skipif(not unified(), reason="no cgroup v2 here")
def test_a_device_that_the_container_made_is_not_opened(container):
    """A container may make nodes; that it may not open them is a matter of its cgroup, which a command is not in."""
    os.mknod(container.path("/tmp/disk"), 0o20666, os.makedev(10, 229))  # /dev/fuse: anybody may open one
    container.path("/tmp/disk").chmod(0o666)
    cgroup = Path(unified(), f"governor-test-{os.getpid()}")
    cgroup.mkdir()

    def prepare():
        (cgroup / "cgroup.procs").write_text("0")
        return b""

    script = "exec 2>&1; head -c0 /tmp/disk; head -c1 /dev/zero | wc -c; echo x > /dev/null && echo written"
    try:
        assert "cannot open" not in sh(container, script, prepare=prepare)[1], "or this shows nothing"
        device_filter.attach(str(cgroup))
        ended, output = sh(container, script, prepare=prepare)
        assert "cannot open '/tmp/disk' for reading: Operation not permitted" in output
        assert output.split()[-2:] == ["1", "written"] and ended.ok
    finally:
        cgroup.rmdir()


@pytest.mark.skipif(not unified(), reason="no cgroup v2 here")
def test_what_it_forks_away_dies_with_it(container, monkeypatch):
    """By way of Commands, in a cgroup of its own; its limits are those of a memory controller, not always here."""
    monkeypatch.setattr(commands, "_LIMITS", {})
    script = "trap '' TERM HUP INT; (setsid sleep 997 &) ; echo started; exec sleep 998"
    watched = Poller()
    looked_after, ended = children.Children(watched), []
    door = inside.door_to(container.pid, container.start_ticks)
    deadline_ns = time.monotonic_ns() + 2 * SECOND
    made, why_not = commands.Commands([unified()]).run(("sh", "-c", script), {}, deadline_ns, "test", door)
    assert not why_not
    looked_after.start(made, ended.append)
    cgroup = next(Path(unified()).glob(f"governor-exec-{os.getpid()}-*"))
    pids = set()
    while not ended:
        watched.wait(20_000_000)
        pids |= set(map(int, (cgroup / "cgroup.procs").read_text().split()))
        looked_after.check_deadlines(time.monotonic_ns())
    door.close()
    assert ended[0].over_deadline and b"started" in ended[0].output
    assert len(pids) >= 3, "who waits, the command, and what it forked away"
    assert not cgroup.exists()

    def are_dead():  # who has left its memcg may still be about to end
        return all(stat is None or stat.ended for stat in map(subtree.read_stat, pids))

    wait_for(are_dead, 10, "the end of all: the container's first process, a sleep, waits for nobody")
