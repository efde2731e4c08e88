"""Labels and annotations by CRI: the real child, over real gRPC, and runtimes that hang, fail or say too much."""

import select
import socket
import subprocess
import sys

import grpc
import pytest

from governor import cri, cri_call
from governor.cri import Answer, Question, Sandbox, sockets
from tests.fakes.cri import Runtime, sandbox

UID, OTHER = "0f9a8b7c-1d2e-4f30-a1b2-c3d4e5f60718", "4d5e6f708192a3b4c5d6e7f8091a2b3c"
LABELS = {"app": "agent", "io.kubernetes.pod.uid": UID}
ANNOTATIONS = {"governor.dev/policy": "careful", "note": "zweiundzwanzig \N{GREEK SMALL LETTER MU} \n"}


@pytest.fixture
def runtime(tmp_path):
    made = []

    def start(sandboxes=(), name="cri.sock", **options):
        made.append(Runtime(tmp_path / name, sandboxes, **options))
        return made[-1]

    yield start
    for one in made:
        one.stop()


def ask(paths, *uids):
    question = Question([str(path) for path in paths], uids, 0)
    assert select.select([question.fd], [], [], 30)[0], "its end is not seen"
    answer = question.answer(0)
    question.close()  # twice is no harm
    return answer


def test_labels_and_annotations_arrive(runtime):
    one = runtime([(UID, sandbox(UID, LABELS, ANNOTATIONS)), ("else", sandbox("else", {"app": "other"}))])
    assert ask([one.path], UID, OTHER) == Answer({UID: Sandbox(LABELS, ANNOTATIONS)})
    assert len(one.requests) == 2


def test_a_uid_that_looks_like_an_option_is_none(runtime):
    one = runtime([("--socket", sandbox("--socket", LABELS))])
    assert ask([one.path], "--socket").sandboxes["--socket"].labels == LABELS


def test_of_a_pod_with_an_old_sandbox_the_ready_one_counts_then_the_latest(runtime):
    of = [
        (UID, sandbox(UID, {"n": "older"}, created_at=1)),
        (UID, sandbox(UID, {"n": "ready"}, created_at=5)),
        (UID, sandbox(UID, {"n": "ended"}, state=1, created_at=9)),
        (OTHER, sandbox(OTHER, {"n": "first"}, state=1, created_at=7)),
        (OTHER, sandbox(OTHER, {"n": "second"}, state=1, created_at=8)),
    ]
    found = ask([runtime(of).path], UID, OTHER).sandboxes
    assert {uid: one.labels["n"] for uid, one in found.items()} == {UID: "ready", OTHER: "second"}


def test_long_annotations_are_left_out_but_governors_own_are_not(runtime):
    many = {"last-applied": "x" * 200_000, "short": "s", "governor.dev/policy": "p" * 1000}
    many |= {f"note-{i}": "y" * 500 for i in range(100)}
    kept = ask([runtime([(UID, sandbox(UID, LABELS, many))]).path], UID).sandboxes[UID]
    assert kept.labels == LABELS
    assert {"governor.dev/policy", "short", "note-7"} <= kept.annotations.keys()
    assert sum(len(key) + len(value) for key, value in kept.annotations.items()) <= cri_call.KEPT_CHARACTERS


def test_an_answer_that_is_too_large_costs_its_own_pod_only(runtime):
    huge = {f"note-{i}": "y" * 250_000 for i in range(20)}
    one = runtime([(OTHER, sandbox(OTHER, {}, huge)), (UID, sandbox(UID, LABELS))])
    assert ask([one.path], OTHER, UID) == Answer({UID: Sandbox(LABELS, {})})


def test_one_runtime_that_knows_no_cri_beside_another(runtime):
    docker = runtime(name="docker.sock", status=grpc.StatusCode.UNIMPLEMENTED)
    other = runtime([(UID, sandbox(UID, LABELS))])
    answer = ask([docker.path, other.path], UID)
    assert answer.sandboxes == {UID: Sandbox(LABELS, {})}
    assert answer.failed == f"{docker.path}: UNIMPLEMENTED: not here"


def test_a_socket_that_nobody_listens_on_is_said(tmp_path):
    with socket.socket(socket.AF_UNIX) as unheard:
        unheard.bind(str(tmp_path / "s"))
    answer = ask([tmp_path / "s"], UID)
    assert not answer.sandboxes
    assert f"{tmp_path}/s: UNAVAILABLE" in answer.failed


def test_a_runtime_that_hangs_is_not_waited_for(runtime):
    one = runtime([(UID, sandbox(UID, LABELS))])
    one.hang.clear()
    question = Question([one.path], [UID], 0)
    assert not select.select([question.fd], [], [], 1)[0]
    assert question.answer(cri.DEADLINE_NS - 1) is None
    assert question.answer(cri.DEADLINE_NS) == Answer(failed="no answer within its deadline")
    assert question.fd == -1


def test_without_grpc_what_to_install_is_said(tmp_path):
    code = "import sys; sys.modules['grpc'] = None; from governor.cri_call import main; main(sys.argv[1:])"
    said = subprocess.check_output([sys.executable, "-c", code, "--socket", "/s", "--", UID])
    assert "pip install '.[node]'" in cri.parse_answer(said, frozenset([UID])).failed


def test_a_child_that_fails_leaves_its_words(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert ask([tmp_path / "s"], UID) == Answer(failed="status 1: ")
    monkeypatch.setattr(sys, "executable", "/bin/ls")
    assert "ls: " in ask([tmp_path / "s"], UID).failed


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"null", b"[]", b"{", b'{"sandboxes":[],"failed":""}', b'{"sandboxes":{}}'),
        *(b'{"sandboxes":{"%s":{"labels":1,"annotations":{}}},"failed":""}' % UID.encode(), b"\xff"),
    ],
)
def test_an_answer_that_is_not_as_expected_is_a_failure(data):
    answer = cri.parse_answer(data, frozenset([UID]))
    assert "not as expected" in answer.failed
    assert not answer.sandboxes


def test_sandboxes_that_were_not_asked_for_are_left_out():
    said = b'{"sandboxes":{"x":{"labels":{},"annotations":{}}},"failed":""}'
    assert cri.parse_answer(said, frozenset([UID])) == Answer()


def test_only_sockets_that_are_there_are_asked(tmp_path):
    assert sockets(str(tmp_path)) == []
    (tmp_path / "run/crio").mkdir(parents=True)
    (tmp_path / "run/containerd").mkdir()
    (tmp_path / "run/containerd/containerd.sock").touch()
    with socket.socket(socket.AF_UNIX) as crio:
        crio.bind(str(tmp_path / "run/crio/crio.sock"))
        assert sockets(str(tmp_path)) == [str(tmp_path / "run/crio/crio.sock")]


def test_the_resident_process_imports_no_grpc():
    code = "import governor.census, sys; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {name for name in loaded if name.split(".")[0] in ("grpc", "google", "governor.cri_call")}
