"""Agents that listen on governor's socket, and do what they are asked in every way there is."""

import os

import pytest

from tests.waiting import wait_for

pytestmark = pytest.mark.any_kernel

POLICY = """
[compact]
deadline = "3s"
settle = "2s"
retry = "1s"
"""


@pytest.mark.parametrize(
    ("how", "ends"),
    [
        ("frees", "compact freed"),
        ("late", "compact freed"),
        ("nothing", "no use"),
        ("defers", "compact freed"),
        ("ignores", "nobody acknowledged it in time"),
        ("crashes", "who was asked for it is gone"),
    ],
)
def test_what_becomes_of_a_request(container, guard, tmp_path, how, ends):
    pod = container(128)
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    agent = pod.agent(
        *(tmp_path / "session.jsonl", "touch", "--start-mb", "70", "--total-mb", "16", "--rate-mb", "20"),
        *("--subscribe", how),
    )
    governor = guard(pod, "--policy", policy).ready()
    assert agent.stdout.readline() == "subscribed\n"
    agent.go()
    wait_for(lambda: ends in governor.log(), 60)
    wait_for(lambda: "asked to compact\n" in [agent.stdout.readline(), agent.stdout.readline()])
    expected = {
        "ignores": ["compact_failed"],
        "crashes": ["compact_failed"],
        "defers": ["compact_deferred", "delivered"],
    }
    wait_for(lambda: governor.lines("delivered", "compact_failed"))  # the journal's line comes after the log's
    answered = [line["kind"] for line in governor.lines("delivered", "compact_failed", "compact_deferred")]
    assert answered == expected.get(how, ["delivered"])
    assert not governor.lines("terminating", "killed")
    if how in ("frees", "late", "defers"):
        wait_for(lambda: pod.ratio() < 0.5)
        assert "of use" in governor.lines("settled")[0]["text"]


def test_the_socket_is_there_while_it_guards(container, guard):
    pod = container(128)
    governor = guard(pod)
    governor.await_line("protecting")
    path = f"/run/governor/memcg-{os.stat(pod.path).st_ino}.sock"
    assert os.stat(path).st_mode & 0o777 == 0o666
    governor.stop()
    assert not os.path.exists(path)
