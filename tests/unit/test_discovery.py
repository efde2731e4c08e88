"""Containers that come and go in a real tree of directories, seen through real inotify."""

import errno
import gc
import itertools
import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from governor import discovery
from governor.discovery import Appeared, Discovery, Gone, Inotify
from governor.pods import place_of

SECOND = 1_000_000_000
UID = "0f9a8b7c-1d2e-4f30-a1b2-c3d4e5f60718"


def id_of(number):
    return f"{number:064x}"


def pod_of(number, qos="burstable"):
    return f"kubepods/{qos}/pod{number:08x}-1d2e-4f30-a1b2-c3d4e5f60718"


def made(root, path):
    directory = Path(root, path)
    directory.mkdir(parents=True)
    return str(directory)


def watched_by_the_kernel(found):
    return Path(f"/proc/self/fdinfo/{found.fd}").read_text().count("inotify wd:")


def descriptors():
    gc.collect()  # what earlier tests left open is none of this one's
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def root(tmp_path):
    for path in ("kubepods/burstable", "kubepods/besteffort", "system.slice/ssh.service"):
        made(tmp_path, path)
    return tmp_path


@pytest.fixture
def found(root):
    """Has seen everything that was there; the clock stands at 0, so that rescans are only what a test asks for."""
    one = Discovery(str(root), 0)
    assert one.drain(0) == []
    yield one
    one.close()


class Seen:
    """The containers that are there, as what drain() said leaves them."""

    def __init__(self):
        self.paths, self.appeared = set(), []

    def heed(self, events):
        for event in events:
            if isinstance(event, Appeared):
                assert event.path not in self.paths, "appeared twice"
                self.paths.add(event.path)
                self.appeared.append(event.path)
            else:
                self.paths.remove(event.path)


def test_what_is_there_already_appears_at_the_first_look(root):
    burstable = made(root, f"{pod_of(1)}/{id_of(1)}")
    guaranteed = made(root, f"kubepods/pod{UID}/crio-{id_of(2)}")
    made(root, f"kubepods/pod{UID}/crio-conmon-{id_of(3)}")
    made(root, f"{pod_of(1)}/{id_of(1)}/kubepods/pod{UID}/{id_of(4)}")
    one = Discovery(str(root), 0)
    events = one.drain(0)
    assert {event.path for event in events} == {burstable, guaranteed}
    assert all(event.place == place_of(event.path.removeprefix(str(root))) for event in events)
    assert one.drain(SECOND) == []
    one.close()


def test_containers_come_and_go_one_by_one(root, found):
    path = made(root, f"{pod_of(1)}/{id_of(1)}")
    [event] = found.drain(1)
    assert event == Appeared(path, place_of(f"{pod_of(1)}/{id_of(1)}"))
    made(root, f"{pod_of(1)}/{id_of(1)}/init.scope")  # its own
    assert found.drain(2) == []
    second = made(root, f"{pod_of(1)}/{id_of(2)}")
    assert [event.path for event in found.drain(3)] == [second]
    shutil.rmtree(path)
    assert found.drain(4) == [Gone(path)]
    shutil.rmtree(root / pod_of(1))
    assert found.drain(5) == [Gone(second)]
    assert found.watches == watched_by_the_kernel(found) == 4  # the root, kubepods, two QoS classes


def test_its_descriptor_is_ready_when_something_came(root, found):
    made(root, pod_of(1))
    assert found.drain(1) == []
    made(root, f"{pod_of(1)}/{id_of(1)}")
    assert discovery.os.read(found.fd, 4096)
    assert found.drain(2) == []  # somebody else took it: ...
    assert len(found.drain(discovery.RESCAN_NS)) == 1  # ... a rescan finds it


def test_one_that_came_again_under_its_path_is_told_of_as_another(root, found):
    path = made(root, f"{pod_of(1)}/{id_of(1)}")
    found.drain(1)
    os.rmdir(path)
    os.mkdir(path)
    assert [type(event) for event in found.drain(2)] == [Gone, Appeared]


def test_one_that_was_replaced_unseen_is_another_at_the_rescan(root, found):
    path = made(root, f"{pod_of(1)}/{id_of(1)}")
    found.drain(1)
    other = made(root, "other")
    os.rmdir(path)
    os.rename(other, path)  # inode numbers of removed directories may come again, this one cannot
    assert os.read(found.fd, 4096)
    assert [type(event) for event in found.drain(discovery.RESCAN_NS)] == [Gone, Appeared]


def test_one_made_while_its_pod_is_looked_at_appears_once(root, found, monkeypatch):
    list_directories = discovery._directories

    def slow(path):
        """Between the watch and the list: seen by both."""
        if "/pod" in path:
            os.mkdir(f"{path}/{id_of(1)}")
        return list_directories(path)

    monkeypatch.setattr(discovery, "_directories", slow)
    made(root, pod_of(1))
    assert [type(event) for event in found.drain(1)] == [Appeared]
    assert found.drain(2) == []


@pytest.mark.parametrize("through", ["inotify", "rescan"])
def test_a_pod_that_is_moved_takes_its_containers_along(root, found, through):
    path = made(root, f"{pod_of(1)}/{id_of(1)}")
    found.drain(1)
    os.rename(root / pod_of(1), root / pod_of(1, "besteffort"))
    if through == "rescan":
        assert os.read(found.fd, 4096)
    new = str(root / pod_of(1, "besteffort") / id_of(1))
    events = found.drain(discovery.RESCAN_NS if through == "rescan" else 2)
    assert [event.path for event in events] == [path, new]
    inside = made(root, f"{pod_of(1, 'besteffort')}/{id_of(2)}")
    assert [event.path for event in found.drain(3)] == [inside]
    assert found.watches == watched_by_the_kernel(found) == 5


def test_a_kubelet_that_comes_later_and_in_a_container_is_found_by_a_rescan(root, found):
    kubelet = f"system.slice/docker-{id_of(9)}.scope/kubelet.slice/kubelet-kubepods.slice"
    pod = f"{kubelet}/kubelet-kubepods-pod{UID.replace('-', '_')}.slice"
    path = made(root, f"{pod}/cri-containerd-{id_of(1)}.scope")
    assert found.drain(1) == []
    assert [event.path for event in found.drain(discovery.RESCAN_NS)] == [path]
    second = made(root, f"{pod}/cri-containerd-{id_of(2)}.scope")
    assert [event.path for event in found.drain(discovery.RESCAN_NS + 1)] == [second]
    shutil.rmtree(root / kubelet)
    assert {event.path for event in found.drain(discovery.RESCAN_NS + 2)} == {path, second}
    assert not any("kubelet-kubepods" in watched for watched in found._watches)


def test_who_has_a_cgroup_of_his_own_makes_no_kubelets(root, found):
    theirs = "user.slice/user-1000.slice/user@1000.service/kubepods"
    made(root, f"{theirs}/burstable/pod{UID}/{id_of(1)}")
    os.chown(root / theirs, 1000, 1000)
    assert found.drain(discovery.RESCAN_NS) == []
    os.chown(root / theirs, 0, 0)
    assert len(found.drain(2 * discovery.RESCAN_NS)) == 1


def test_links_lead_nowhere(root, found, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    made(elsewhere, id_of(1))
    os.symlink(elsewhere, root / pod_of(1))
    os.mkdir(root / pod_of(2))
    os.symlink(elsewhere, root / pod_of(2) / id_of(2))
    Path(root / pod_of(2) / id_of(3)).touch()
    assert found.drain(1) == found.drain(discovery.RESCAN_NS) == []


def test_a_pod_that_is_another_as_soon_as_it_is_watched(root, found, monkeypatch):
    """Its successor's container is listed by the old one's watch, and gone before the new one's begins."""
    pod, watch, times = root / pod_of(1), found._watch, itertools.count()

    def watch_late(path):
        number = next(times) if path == str(pod) else -1
        if number == 1:
            shutil.rmtree(pod)
        watch(path)
        if number == 0:
            os.rmdir(pod)
            made(root, f"{pod_of(1)}/{id_of(1)}")

    monkeypatch.setattr(found, "_watch", watch_late)
    os.mkdir(pod)
    seen = Seen()
    seen.heed(found.drain(1))
    assert not seen.paths
    assert next(times) > 1


def test_two_thousand_at_random_none_missed_nothing_left(root, found):
    """Another process makes and removes them as fast as it can, pods and all; what stays is what is known."""
    descriptors_before, watches_before = descriptors(), watched_by_the_kernel(found)
    code = (
        "import os, random, sys\n"
        "root, there, chance = sys.argv[1], [], random.Random(7)\n"
        "for number in range(2000):\n"
        "    pod = f'{root}/kubepods/burstable/pod{chance.randrange(40):08x}'\n"
        "    os.makedirs(f'{pod}/{number:064x}')\n"
        "    there.append((pod, f'{pod}/{number:064x}'))\n"
        "    if chance.random() < 0.97:\n"
        "        pod, path = there.pop(chance.randrange(len(there)))\n"
        "        os.rmdir(path)\n"
        "        if not os.listdir(pod): os.rmdir(pod)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(root)])
    seen = Seen()
    while process.poll() is None:
        seen.heed(found.drain(1))
    assert process.returncode == 0
    seen.heed(found.drain(1))
    there = {str(path) for path in root.glob("kubepods/burstable/pod*/*")}
    assert len(there) > 20
    assert seen.paths == there
    shutil.rmtree(root / "kubepods" / "burstable")
    os.mkdir(root / "kubepods" / "burstable")
    seen.heed(found.drain(1))
    assert not seen.paths
    assert watched_by_the_kernel(found) == found.watches == watches_before
    assert len(found._paths) == found.watches
    assert descriptors() == descriptors_before


def test_records_that_the_kernel_dropped_lead_to_a_rescan(root, found):
    queue = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    os.mkdir(root / pod_of(1))
    found.drain(1)
    for number in range(queue // 2 + 100):  # two records each
        os.rmdir(made(root, f"{pod_of(1)}/{id_of(number)}"))
    kept = {made(root, f"{pod_of(pod)}/{id_of(queue + pod)}") for pod in range(1, 50)}
    seen = Seen()
    seen.heed(found.drain(2))
    assert seen.paths == kept
    assert sorted(seen.appeared) == sorted(kept)  # each once; of the others none is there any more


def test_where_watches_are_used_up_rescans_see_it_within_a_second(root, found, monkeypatch):
    add = Inotify.add

    def refuse(self, path):
        if "/pod" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return add(self, path)

    monkeypatch.setattr(Inotify, "add", refuse)
    os.mkdir(root / pod_of(1))
    assert found.drain(SECOND) == []
    assert "max_user_watches" in found.blind
    assert found.due_ns == 2 * SECOND
    path = made(root, f"{pod_of(1)}/{id_of(1)}")
    assert [event.path for event in found.drain(2 * SECOND)] == [path]
    monkeypatch.undo()
    assert found.drain(3 * SECOND) == []
    assert (found.blind, found.due_ns) == ("", 3 * SECOND + discovery.RESCAN_NS)


def test_without_inotify_rescans_see_it(root, monkeypatch):
    def refuse(self):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Inotify, "__init__", refuse)
    one = Discovery(str(root), 0)
    assert one.drain(0) == []
    assert (one.fd, one.due_ns) == (-1, discovery.BLIND_RESCAN_NS)
    assert "max_user_instances" in one.blind
    path = made(root, f"{pod_of(1)}/{id_of(1)}")
    assert [event.path for event in one.drain(SECOND)] == [path]
    os.rmdir(path)
    assert one.drain(2 * SECOND) == [Gone(path)]


def test_a_root_that_is_none_is_said(tmp_path):
    with pytest.raises(FileNotFoundError):
        Discovery(str(tmp_path / "none"), 0)


def test_others_cgroups_in_any_number_do_not_hold_it_up(root, found, monkeypatch):
    for number in range(discovery.SEARCH_MAX + 10):
        made(root, f"system.slice/docker-{id_of(1)}.scope/{number}/inner")
    path = made(root, f"{pod_of(1)}/{id_of(1)}")
    assert os.read(found.fd, 4096)
    looked = []
    list_directories = discovery._directories
    monkeypatch.setattr(discovery, "_directories", lambda path: looked.append(path) or list_directories(path))
    assert [event.path for event in found.drain(discovery.RESCAN_NS)] == [path]
    assert discovery.SEARCH_MAX <= len(looked) < discovery.SEARCH_MAX + 10


def test_at_random_it_always_knows_what_is_there(root, found):
    """Pods and containers come, go, and come again under their names; some records are lost."""
    chance = random.Random(3)
    seen, now = Seen(), 1
    for _ in range(300):
        pod = root / pod_of(chance.randrange(4), chance.choice(["burstable", "besteffort"]))
        path = pod / id_of(chance.randrange(3))
        if chance.random() < 0.6:
            path.mkdir(parents=True, exist_ok=True)
        else:
            shutil.rmtree(chance.choice([pod, path]), ignore_errors=True)
        lost = chance.random() < 0.1
        if lost:
            with suppress(BlockingIOError):
                os.read(found.fd, 1 << 16)
        if lost or chance.random() < 0.5:
            now += discovery.RESCAN_NS if lost else 1
            seen.heed(found.drain(now))
            assert seen.paths == {str(path) for path in root.glob("kubepods/*/pod*/*")}
