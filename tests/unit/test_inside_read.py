"""Files of a container that is hostile ground, by real namespaces: what is read, and what leads nowhere."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from governor import archive, inside, inside_read, subtree
from governor.agent_process import AgentProcess
from tests.fakes import container as containers

pytestmark = pytest.mark.skipif(bool(containers.why_none()), reason=f"no containers here: {containers.why_none()}")
GLOBS = ("~/**/*.jsonl",)


@pytest.fixture
def container():
    made = containers.Container()
    made.write("/home/agent/one.jsonl", b"one\n")
    yield made
    made.close()


@contextlib.contextmanager
def door_to(container):
    door = inside.door_to(container.pid, container.start_ticks)
    yield door
    door.close()


def read(container, *globs, exclude=()):
    """Path to content, path to why not, and whether it was cut short."""
    files, skipped, cut_short = {}, {}, False
    with door_to(container) as door:
        for found in inside_read.find_inside(door, globs or GLOBS, exclude):
            cut_short |= found.is_cut_short
            if found.fd is None:
                skipped[found.path] = found.skipped
                continue
            files[found.path] = os.pread(found.fd, 1 << 16, 0)
            os.close(found.fd)
    return files, skipped, cut_short


def test_a_session_is_read_where_the_container_has_it(container):
    container.write("/home/agent/deep/two.jsonl", b"two\n")
    files, skipped, cut_short = read(container)
    assert files == {"/home/agent/one.jsonl": b"one\n", "/home/agent/deep/two.jsonl": b"two\n"}, skipped
    assert (skipped, cut_short) == ({}, False)


def test_who_lives_with_us_is_read_as_ever():
    own = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    assert inside.door_to(os.getpid(), int(own)) is None


def test_a_link_leads_nowhere_and_the_fixed_part_stays_inside(container, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.jsonl").write_bytes(b"the host's")
    home = container.path("/home/agent")
    (home / "link.jsonl").symlink_to(secret / "key.jsonl")
    (home / "up.jsonl").symlink_to("../" * 40 + str(secret / "key.jsonl"))
    (home / "linked").symlink_to(secret)
    files, skipped, _ = read(container, "~/**/*.jsonl", "~/linked/*", f"{secret}/*", "/home/agent/linked/*.jsonl")
    assert set(files) == {"/home/agent/one.jsonl"}
    assert skipped["/home/agent/link.jsonl"] == skipped["/home/agent/up.jsonl"] == "a symbolic link"


def test_a_component_that_is_swapped_for_a_link_leads_nowhere(container, tmp_path):
    """A thread of the container swaps every component of a path while it is walked, over and over."""
    (tmp_path / "host").mkdir()
    (tmp_path / "host/x.jsonl").write_bytes(b"the host's")
    container.write("/home/agent/a/b/x.jsonl", b"its own")
    container.write("/var/lib/root.jsonl", b"not its own", uid=0).chmod(0o600)
    home = container.path("/home/agent")
    other = {
        home / "a": "/var/lib",
        home / "a/b": "/proc/1/root/var/lib",
        home / "a/b/x.jsonl": "/var/lib/root.jsonl",
    }
    done = threading.Event()

    def swap():
        while not done.is_set():
            for path, target in other.items():
                kept = path.with_name("kept")
                with contextlib.suppress(OSError):
                    path.rename(kept)
                    path.symlink_to(target)
                    path.unlink()
                    kept.rename(path)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        contents = {content for _ in range(20) for content in read(container)[0].values()}
    finally:
        done.set()
        swapper.join()
    assert contents <= {b"one\n", b"its own"} and b"one\n" in contents


def test_fifo_device_socket_and_directory_are_not_opened(container):
    home = container.path("/home/agent")
    os.mkfifo(home / "fifo.jsonl")
    os.mknod(home / "zero.jsonl", 0o20666, os.makedev(1, 5))
    os.mknod(home / "socket.jsonl", 0o140666)
    (home / "directory.jsonl").mkdir()
    files, skipped, _ = read(container)
    assert set(files) == {"/home/agent/one.jsonl"}
    odd = ("fifo", "zero", "socket")
    assert skipped == {f"/home/agent/{name}.jsonl": "not a regular file" for name in odd}


def test_proc_shows_nothing(container):
    globs = (
        "/proc/self/*",
        "/proc/1/*",
        "/proc/*/root/**/*",
        "/proc/*/fd/*",
        "/proc/self/root/home/**/*",
        "/sys/**/*",
    )
    container.path("/home/agent/self").symlink_to("/proc/self/cwd/home/agent")
    files, skipped, _ = read(container, *globs, "/home/agent/self/*", "/dev/fd/*")
    assert files == {}
    assert "not the machine's own (type 0x9fa0)" in skipped["/proc/1/status"]
    assert skipped["/proc/self/*"] == "No such file or directory", "the reader has no pid there"


def test_the_reader_has_no_rights_and_is_not_seen():
    made = containers.Container()
    fd = made.mount_fuse("/home/agent/stuck")
    try:
        with reader_at_work(made) as reader:
            status = dict(line.split(":\t") for line in Path(f"/proc/{reader}/status").read_text().splitlines())
            assert {status[name] for name in ("Uid", "Gid")} == {"\t".join(["12345"] * 4)}
            assert set(status["Groups"].split()) == {"4242", "12345"}
            capabilities = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
            assert {status[name] for name in capabilities} == {"0" * 16}
            assert status["NoNewPrivs"] == "1"
            assert status["NSpid"] == str(reader), "it is in no PID namespace but ours"
            assert Path(f"/proc/{reader}/environ").stat().st_uid == 0, "it is not dumpable"
            assert Path(f"/proc/{reader}/root/home/agent").is_dir()
            inner = subprocess.run(
                ["nsenter", "-t", str(made.pid), "--mount", "--pid", "ls", "/proc"], capture_output=True, check=True
            )
            assert str(reader) not in inner.stdout.decode().split()
    finally:
        os.close(fd)
        made.close()


@pytest.mark.parametrize("uid", [containers.AGENT_UID, 0], ids=["a user", "root"])
def test_the_reader_is_looked_into_by_nobody_who_has_its_uid(uid, monkeypatch):
    """The kernel itself sees to that where it changes its user; not for a container's root."""

    def search(*_):
        raise OSError(f"PR_GET_DUMPABLE {ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)}")

    monkeypatch.setattr(inside_read, "_search", search)
    made = containers.Container(uid=uid)
    try:
        assert "PR_GET_DUMPABLE 0" in read(made)[1]["/"]
    finally:
        made.close()


@contextlib.contextmanager
def reader_at_work(container):
    """The pid of a reader that hangs in a mount of FUSE."""
    with door_to(container) as door:
        search = inside_read.find_inside(door, ("~/stuck/*",), ())
        worker = threading.Thread(target=lambda: [*search])
        worker.start()
        own = f"/proc/self/task/{worker.native_id}/children"
        until = time.monotonic() + 5
        while time.monotonic() < until and not (pids := Path(own).read_text().split()):
            time.sleep(0.01)
        while time.monotonic() < until and "NoNewPrivs:\t1" not in Path(f"/proc/{pids[0]}/status").read_text():
            time.sleep(0.01)
        yield int(pids[0])
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pids[0]), signal.SIGKILL)
        worker.join()


def to_archive(container, tmp_path, *globs, limit_bytes=1 << 30):
    with door_to(container) as door:
        where = tmp_path / "archives"
        made = archive.write(
            where,
            [],
            "a test",
            "x",
            {},
            limit_bytes,
            matches=lambda: inside_read.find_inside(door, globs or GLOBS, ()),
        )
    out = tmp_path / f"out-{made.name}"
    return made, {f"/{path.relative_to(out)}": path for path in archive.restore(where, made.name, out)}


def test_sparse_and_endless_files_are_bounded(container, tmp_path):
    with container.path("/home/agent/sparse.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    with container.path("/home/agent/holes.jsonl").open("wb") as file:
        file.truncate(100 << 20)
    os.chown(container.path("/home/agent/sparse.jsonl"), 12345, 12345)
    made, files = to_archive(container, tmp_path)
    assert set(files) == {"/home/agent/one.jsonl"} and not made.complete
    assert "over what is left" in made.skipped["/home/agent/sparse.jsonl"]
    assert "holes" in made.skipped["/home/agent/holes.jsonl"]


def test_a_file_that_grows_and_one_that_shrinks_while_they_are_read(container, tmp_path):
    grows = container.write("/home/agent/grows.jsonl", b"g" * (1 << 20))
    shrinks = container.write("/home/agent/shrinks.jsonl", b"s" * (8 << 20))
    done = threading.Event()

    def change():
        with grows.open("ab") as file:
            while not done.is_set():
                if file.tell() < 32 << 20:  # more than is archived, if it is read slowly
                    file.write(b"g" * 4096)
                os.truncate(shrinks, 8 << 20)
                os.truncate(shrinks, 0)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        made, files = to_archive(container, tmp_path, limit_bytes=64 << 20)
    finally:
        done.set()
        changer.join()
    assert set(files["/home/agent/grows.jsonl"].read_bytes()) == set(b"g")
    sizes = {entry.path: entry.size_bytes for entry in made.files}
    assert all(path.stat().st_size == sizes[name] for name, path in files.items())


def test_a_file_system_that_never_answers_costs_only_what_comes_after_it(container, tmp_path, monkeypatch):
    monkeypatch.setattr(inside_read, "_SILENCE_S", 1.0)
    fd = container.mount_fuse("/home/agent/stuck")
    container.write("/home/agent/z.jsonl", b"after it")
    try:
        made, files = to_archive(container, tmp_path, "~/one.jsonl", "~/stuck/**/*.jsonl", "~/z.jsonl")
    finally:
        os.close(fd)
    assert set(files) == {"/home/agent/one.jsonl"} and not made.complete
    assert made.skipped == {"/": "the search inside the container was cut short: nothing was heard for 1 s"}


@pytest.mark.parametrize(
    ("number", "why"), [(signal.SIGSTOP, "nothing was heard for 1 s"), (signal.SIGKILL, "was killed")]
)
def test_a_reader_that_is_stopped_or_killed(container, monkeypatch, number, why):
    """By a process of the same user that sees it: a container with the machine's PID namespace."""
    monkeypatch.setattr(inside_read, "_SILENCE_S", 1.0)
    container.write("/home/agent/two.jsonl", b"two\n")
    with door_to(container) as door:
        search = inside_read.find_inside(door, GLOBS, ())
        os.close(next(search).fd)
        reader = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[-1]
        os.kill(int(reader), number)
        rest = [*search]
    assert rest[-1].is_cut_short and rest[-1].skipped.endswith(why)
    assert not Path(f"/proc/{reader}").exists()


WITHOUT_ROOM = """
import os, sys
from governor import inside, inside_read
inside_read._MEMORY_BYTES = 0  # as if there were a hundred times as many
for last in inside_read.find_inside(inside.door_to(int(sys.argv[1]), int(sys.argv[2])), ("~/**/*.jsonl",), ()):
    if last.fd is not None:
        os.close(last.fd)
print(last.is_cut_short)
"""


def test_a_hundred_thousand_files(container):
    home = container.path("/home/agent/many")
    home.mkdir()
    directory = os.open(home, os.O_RDONLY)
    for number in range(100_000):
        os.close(os.open(f"{number:0240}.jsonl", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=directory))
    os.close(directory)
    with door_to(container) as door:
        count, last = 0, None
        for last in inside_read.find_inside(door, GLOBS, ()):
            count += 1
            if last.fd is not None:
                os.close(last.fd)
    assert count == 100_001 or last.is_cut_short
    words = [sys.executable, "-c", WITHOUT_ROOM, str(container.pid), str(container.start_ticks)]
    assert subprocess.check_output(words, text=True) == "True\n", "it was cut short, and not by governor's own memory"


def test_a_directory_that_is_mounted_into_itself_ends():
    nest = "cd /home/agent; mkdir -p a; for i in 1 2 3 4 5 6; do mount --rbind /home/agent /home/agent/a; done; cd /"
    made = containers.Container(setup=nest)
    try:
        made.write("/home/agent/one.jsonl", b"one\n")
        files, _, _ = read(made)
        assert list(files.values()) == [b"one\n"], "each file once"
    finally:
        made.close()


def test_an_overlay_that_is_not_the_containers_root_is_not_read():
    """What is below it may be FUSE, and looks as the machine's own."""
    over = "mkdir /tmp/low /tmp/lower; echo x > /tmp/low/two.jsonl; mkdir /home/agent/over; "
    over += "mount -t overlay overlay -o lowerdir=/tmp/low:/tmp/lower /home/agent/over"
    made = containers.Container(setup=over)
    try:
        made.write("/home/agent/one.jsonl", b"one\n")
        files, skipped, _ = read(made)
        assert list(files) == ["/home/agent/one.jsonl"]
        assert skipped == {"/home/agent/over/two.jsonl": "on an overlay that is not the container's root"}
    finally:
        made.close()


def test_names_that_steer_a_terminal_or_are_no_text(container, tmp_path):
    names = (b"new\nline.jsonl", b"\x1b[2J.jsonl", b"\xff\xfe.jsonl", b" .jsonl", b"-rf.jsonl")
    for name in names:
        container.write(os.fsdecode(b"/home/agent/" + name), name)
    made, files = to_archive(container, tmp_path)
    assert {path.read_bytes() for path in files.values()} == {*names, b"one\n"}
    assert "/home/agent/\\xff\\xfe.jsonl" in {entry.path for entry in made.files}


def test_only_what_the_process_may_read_is():
    """Not even a container's user 0 has the rights of user 0: it has no capability."""
    for uid in (0, containers.AGENT_UID):
        made = containers.Container(uid=uid)
        try:
            made.write("/home/agent/own.jsonl", b"own", uid=uid).chmod(0o600)
            made.write("/home/agent/others/x.jsonl", b"other", uid=777).chmod(0o600)
            made.path("/home/agent/others").chmod(0o755)
            files, skipped, _ = read(made)
            assert (set(files.values()), skipped) == ({b"own"}, {"/home/agent/others/x.jsonl": "Permission denied"})
        finally:
            made.close()


@pytest.mark.parametrize("home", ["", "relative", "/nowhere/../home/agent", "/home/link"])
def test_home_is_what_the_container_says_it_is(home):
    made = containers.Container(home=home, setup="ln -s agent /home/link")
    try:
        made.write("/home/agent/one.jsonl", b"one\n")
        assert read(made)[0] == {"/home/agent/one.jsonl": b"one\n"}
    finally:
        made.close()


def test_no_module_is_imported_from_a_container(container, monkeypatch):
    def search(*_):
        import this  # noqa: F401  any that is not loaded

    sys.modules.pop("this", None)
    place = Path(os.__file__).with_name("this.py")  # where one would be looked for
    if not place.is_relative_to("/usr"):  # the container has ours
        container.write(str(place), b"raise OSError('its own')", uid=0)
    monkeypatch.setattr(inside_read, "_search", search)
    _, skipped, cut_short = read(container)
    assert cut_short and "No module named 'this'" in skipped["/"]


def test_a_container_in_a_user_namespace_of_its_own():
    files_of = "cd /home/agent; for name in own roots; do echo $name > $name.jsonl; chmod 600 $name.jsonl; done"
    made = containers.Container(users=True, setup=f"{files_of}; chown $2:$2 own.jsonl; cd /")
    try:
        with door_to(made) as door:
            inhabitant = inside.who(door)
        assert (inhabitant.uid, inhabitant.inner_uid) == (100_000 + containers.AGENT_UID, containers.AGENT_UID)
        files, skipped, _ = read(made)
        assert files == {"/home/agent/own.jsonl": b"own\n"}
        assert skipped == {"/home/agent/roots.jsonl": "Permission denied"}
    finally:
        made.close()


def test_a_container_that_ends_meanwhile_is_read_on(container):
    container.write("/home/agent/two.jsonl", b"two\n")
    with door_to(container) as door:
        search = inside_read.find_inside(door, GLOBS, ())
        os.close(next(search).fd)
        container.end()
        assert [found.path for found in search] == ["/home/agent/two.jsonl"]
        again = [*inside_read.find_inside(door, GLOBS, ())]
        assert [found.path for found in again] == ["/home/agent/one.jsonl", "/home/agent/two.jsonl"]


def test_a_pid_that_was_recycled_is_not_entered():
    made = containers.Container()
    door = inside.door_to(made.pid, made.start_ticks)
    pid, start_ticks = made.pid, made.start_ticks
    made.end()
    until = time.monotonic() + 10
    while time.monotonic() < until:
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        other = subprocess.Popen(["unshare", "--mount", "sleep", "60"], env={"HOME": "/recycled"})
        if other.pid == pid:
            break
        other.kill()
        other.wait()
    assert other.pid == pid, "no pid was recycled"
    try:
        time.sleep(0.1)
        with pytest.raises(ProcessLookupError):
            inside.door_to(pid, start_ticks)
        with pytest.raises(ProcessLookupError):
            inside.environment(door)
        assert inside.who(door) == door.remembered
        with pytest.raises(OSError, match="No such process"):
            inside.enter_users(door)
    finally:
        door.close()
        made.close()
        other.kill()
        other.wait()


def test_an_agent_that_lives_elsewhere_has_no_paths_of_ours(container, tmp_path):
    agent = AgentProcess(str(tmp_path), wanted_pid=container.pid, only_wanted=True)
    assert agent.find() and agent.lives_elsewhere
    assert agent.patterns(["~/*", "/etc/*"]) == [], "they would name files of the host"
    fds = agent.way_in().fds
    container.end()
    found = [*inside_read.find_inside(agent.way_in(), GLOBS, ())]
    assert [each.path for each in found] == ["/home/agent/one.jsonl"], "what it wrote last is read after its end"
    agent.forget()
    assert agent.way_in() is None and agent.patterns(["/etc/*"]) == []
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_one_that_is_ending_is_where_it_was(tmp_path, monkeypatch):
    """Its namespaces and its root go first; only then it is seen to be a zombie."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        agent = AgentProcess(str(tmp_path), wanted_pid=process.pid, only_wanted=True)
        assert agent.find() and not agent.lives_elsewhere
        alive = subtree.read_stat(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        monkeypatch.setattr(inside, "parse_stat", lambda *_: alive)
        assert agent.way_in() is None and not agent.lives_elsewhere
        agent.forget()


MOVING = """
read -r _
exec unshare --mount sh -c '
mkdir "$1/root"; mount -t tmpfs root "$1/root"; cd "$1/root"
mkdir old usr; mount --bind /usr usr; ln -s usr/lib64 usr/lib usr/bin .
echo mounts; read -r _
pivot_root . old; umount -l old; mkdir -p "$1"; echo new > "$1/one.jsonl"
echo root; read -r _' sh "$1"
"""


@pytest.fixture
def moving(tmp_path):
    """A process that becomes a container's, step by step, as what a runtime starts does."""
    (tmp_path / "one.jsonl").write_text("of the host\n")
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    with subprocess.Popen(["sh", "-c", MOVING, "sh", tmp_path], bufsize=0, **pipes) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("known_at", ["its start", "its own mounts"])
@pytest.mark.parametrize("is_followed", [False, True])
def test_it_is_read_where_it_lives_by_now(moving, tmp_path, known_at, is_followed):
    def step(said):
        moving.stdin.write(b"\n")
        assert moving.stdout.readline() == said

    agent = AgentProcess(str(tmp_path), wanted_pid=moving.pid, only_wanted=True)
    if known_at == "its start":
        assert agent.find() and agent.way_in() is None and not agent.lives_elsewhere
    step(b"mounts\n")
    if known_at == "its own mounts":
        assert agent.find() and agent.lives_elsewhere
    step(b"root\n")
    if is_followed:
        agent.follow(time.monotonic_ns())
        moving.kill()
        moving.wait()
    found = [*inside_read.find_inside(agent.way_in(), [f"{tmp_path}/*.jsonl"], ())]
    try:
        assert [os.pread(each.fd, 100, 0) for each in found] == [b"new\n"]
        assert agent.lives_elsewhere and agent.patterns(["/etc/*"]) == []
    finally:
        for each in found:
            os.close(each.fd)
        agent.forget()


def test_while_a_runtime_makes_its_container_there_is_no_way_in(moving, tmp_path):
    """It has the machine's mounts, then its own with the machine's root: neither is the container's."""
    agent = AgentProcess(str(tmp_path), moving.pid, only_wanted=True, lives_elsewhere=True, has_own_mounts=True)
    assert agent.find()
    for said in (b"mounts\n", b"root\n"):
        assert agent.way_in() is None and agent.lives_elsewhere and agent.patterns([f"{tmp_path}/*.jsonl"]) == []
        moving.stdin.write(b"\n")
        assert moving.stdout.readline() == said
    found = [*inside_read.find_inside(agent.way_in(), [f"{tmp_path}/*.jsonl"], ())]
    assert [os.pread(each.fd, 100, 0) for each in found] == [b"new\n"]
    os.close(found[0].fd)
    agent.forget()
