"""The command line, used wrongly: one line that says what was found, what was expected, and the exit status."""

import json
import os
import sys

import pytest
from typer.testing import CliRunner

from governor import cli, instance, pins, run_cli

WRONG = [
    (["hold", "soon"], 2, "found 'soon', expected a duration"),
    (["hold", "10m", "--cgroup", "/nope"], 2, "found no memcg at /nope"),
    (["hold", "10m"], 1, "nothing is guarded"),
    (["hold", "10m", "nobody/nothing"], 2, "found nothing called 'nobody/nothing' here, expected a pod"),
    (["hold", "10m", "self", "--cgroup", "/sys"], 2, "found a TARGET and --cgroup, expected one of them"),
    (["why", "--cgroup", "/nope"], 2, "found no memcg at /nope"),
    (["why", ""], 2, "found an empty TARGET, expected NAMESPACE/POD"),
    (["off", "nobody/nothing"], 2, "found nothing called 'nobody/nothing' here, expected a pod"),
    (["off", "self", "--instance", "node"], 2, "found a TARGET and --instance, expected one of them"),
    (["why"], 0, "nothing was done to a tool here"),
    (["watch", "/nope"], 2, "found no memcg at /nope"),
    (["watch", "nobody/nothing"], 2, "found nothing called 'nobody/nothing' here, expected a pod"),
    (["watch", "4194305"], 2, "found no process 4194305"),
    (["watch", "self", "--source", "x"], 2, "found --source 'x', expected auto, bpf, psi or poll"),
    (["watch", "self", "--source", "bpf", "--once"], 2, "expected --for SECONDS, or another source"),
    (["watch", "self", "--until", "x"], 2, "found --until 'x', expected crossing"),
    (["watch", "--until", "crossing"], 2, "--until needs a TARGET"),
    (["guard", "--cgroup", "/nope"], 2, "found no memcg at /nope"),
    (["load", "--attach", "x"], 2, "found --attach 'x'"),
    (["unload", "--instance", "nope"], 1, "found no instance 'nope'"),
    (["unload", "--instance", "../x", "--in-use"], 2, "found instance name '../x'"),
    (["off", "--instance", "../x"], 2, "found instance name '../x'"),
    (["archive", "list", "--archive-dir", "/nope"], 0, "no archives in /nope"),
    (["archive", "verify", "\x1b[2J"], 1, "found no archive '\\x1b[2J'"),
    (["policy", "check", "/dev/zero"], 2, "found a directory or a device, expected a regular file"),
    (["profile", "check", "nope"], 2, "found no such file or profile"),
    (["replay", "GARBAGE"], 1, "GARBAGE:5 cannot be read: passed over\ngovernor: found no line of kind begin"),
    (["replay", "OTHER"], 1, "OTHER:1: no line of a governor journal"),
    (["run", "--memory-max", "0", "--", "true"], 2, "expected at least"),
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(instance, "run_directory", lambda: tmp_path)
    (tmp_path / "GARBAGE").write_bytes(b"{\n" * 50)
    (tmp_path / "OTHER").write_bytes(b"{}\n")
    monkeypatch.chdir(tmp_path)
    return lambda words: CliRunner().invoke(cli.app, words)


@pytest.mark.parametrize(
    ("words", "status", "said"), WRONG, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_what_is_said_of_wrong_use(run, words, status, said):
    done = run(words)
    assert said in done.stderr, (done.output, done.exception)
    assert done.exit_code == status
    assert done.stdout == ""


def test_programs_in_use_are_unloaded_only_where_that_is_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.setattr(pins, "INSTANCES", tmp_path / "bpf")
    (tmp_path / "bpf" / "node" / "version").mkdir(parents=True)
    held = instance.lock("node")
    assert f"'node' is in use by process {os.getpid()}" in run(["unload", "--instance", "node"]).stderr
    assert run(["unload", "--instance", "node", "--in-use"]).stdout == "node is unloaded\n"
    assert not (tmp_path / "bpf").exists()
    os.close(held)


@pytest.mark.parametrize("options", [[], ["--no-load"]], ids=lambda options: " ".join(options) or "may load")
def test_a_daemon_that_is_not_to_load_is_told_so(run, tmp_path, monkeypatch, options):
    became = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "execv", lambda _, argv: became.append(json.loads(argv[-1])))
    monkeypatch.setattr(cli.guard_options, "bpf_refused", lambda v1: "")
    run(["daemon", "--policies", str(tmp_path), "--instance", "no-such", *options])
    assert [bool(wanted["bpf_refused"]) for wanted in became] == [bool(options)]


def test_help_says_the_defaults_and_no_less():
    done = CliRunner().invoke(cli.app, ["run", "--help"])
    assert "What kind of agent it is [default: known by its name]." in " ".join(done.output.split())
    listed = CliRunner().invoke(cli.app, ["--help"], terminal_width=120).output
    assert "..." not in listed.partition("Commands:")[2]


@pytest.mark.parametrize(
    "words", [["hold", "10m"], ["off"], ["guard", "--cgroup", "MEMCG"]], ids=lambda words: words[0]
)
def test_a_run_time_directory_that_cannot_be_is_named(tmp_path, monkeypatch, capsys, words):
    for name, text in (("memory.stat", "anon 1\n"), ("memory.current", "1"), ("memory.max", "2")):
        (tmp_path / name).write_text(text)

    def refuse():
        raise OSError(30, os.strerror(30), "/run/governor")

    monkeypatch.setattr(instance, "run_directory", refuse)
    monkeypatch.setattr(sys, "argv", ["governor", *(str(tmp_path) if word == "MEMCG" else word for word in words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    assert "governor: /run/governor: Read-only file system" in capsys.readouterr().err


def test_a_run_time_directory_below_somebody_elses_is_refused(tmp_path, monkeypatch):
    """Who owns what is above it could put another one in its place."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory another user's")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 1000, 1000)
    monkeypatch.setattr(os, "geteuid", lambda: 1001)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(theirs))
    with pytest.raises(PermissionError, match="belongs to another user"):
        instance.run_directory()


def test_a_user_without_a_home_has_no_log_and_the_agent_runs(monkeypatch):
    def refuse():
        raise OSError("this user has no home directory")

    monkeypatch.setattr(instance, "state_directory", refuse)
    assert run_cli._log_path(7) == ""
