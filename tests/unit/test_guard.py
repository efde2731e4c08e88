"""What a profile and a guard's options make of a policy."""

from governor.guard import Guard, read_policy, read_profile
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
