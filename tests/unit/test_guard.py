"""What a profile and a guard's options make of a policy."""

import pytest

from governor.guard import Guard, read_policy, read_profile
from governor.guard_options import check_policy
from governor.policy import Efficacy

GUARD = {"cgroup": "/pod", "instance": "i", "knob_path": "k", "archive_directory": "a", "journal_path": "j"}


def policy_of(**options):
    guard = Guard(**GUARD, **options)
    return read_policy(guard, read_profile(guard))


def test_what_a_profile_knows_fills_what_the_policy_leaves_open():
    plain, claude, signals = policy_of(), policy_of(profile="claude-code"), policy_of(profile="generic-signal")
    assert claude.compact.efficacy is Efficacy.USELESS and plain.compact.efficacy is Efficacy.UNKNOWN
    assert (signals.compact.signal, signals.clear.signal) == ("SIGUSR1", "SIGUSR2")
    assert set(plain.archive.globs) <= set(claude.archive.globs)
    assert policy_of(profile="claude-code", archive_globs=["/x"]).archive.globs == ("/x",)


def test_what_a_profile_knows_of_its_own_ways_says_nothing_of_others(tmp_path):
    given = policy_of(profile="claude-code", compact_argv=["mycmd"])
    assert (given.compact.exec, given.compact.efficacy) == (("mycmd",), Efficacy.UNKNOWN)
    (tmp_path / "p.toml").write_text('[clear]\nsignal = "SIGUSR2"\n')
    named = policy_of(profile="claude-code", policy=str(tmp_path / "p.toml"))
    assert (named.clear.signal, named.clear.efficacy) == ("SIGUSR2", Efficacy.UNKNOWN)


@pytest.mark.parametrize(
    ("select", "is_for"),
    [
        ("", True),
        ('cgroup = ["*"]', True),
        ('cgroup = ["x", "system.slice/*"]', True),
        ('namespace = ["agents"]', True),  # a guard does not know; who starts it does
        ('cgroup = ["kubepods*"]', False),
    ],
)
def test_a_guard_looks_at_the_cgroup_alone(tmp_path, select, is_for):
    path = tmp_path / "p.toml"
    path.write_text(f"[select]\n{select}")
    target = "/sys/fs/cgroup/system.slice/agent.service"
    if is_for:
        assert check_policy(str(path), target) == str(path)
    else:
        with pytest.raises(ValueError, match=r"selects kubepods\*, which system.slice/agent.service is not"):
            check_policy(str(path), target)
