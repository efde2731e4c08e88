"""selection: which policy a container gets, what a pod may wish for, and that nothing of it is said raw."""

import time
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.container import Container
from governor.policy import Policy, Select
from governor.selection import ANNOTATION, NONE, Choice, choose

CGROUP = "/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podu.slice/cri-containerd-c.scope"
AGENT = Container(
    CGROUP,
    "c" * 64,
    "u",
    "burstable",
    "agents",
    "claude-0",
    "agent",
    labels={"app": "agent-claude", "tier": "ai", "empty": ""},
    annotations={"team.example/owner": "ml"},
)


def policy(name: str, **select: object) -> Policy:
    return Policy(name=name, select=Select(**select))


def wishing(annotation: str = "", environment: str = "", container: Container = AGENT) -> Container:
    annotations = dict(container.annotations) | ({ANNOTATION: annotation} if annotation else {})
    return replace(container, annotations=annotations, chosen_policy=environment)


def name(choice: Choice) -> str | None:
    return choice.policy.name if choice.policy else None


MATCHES = [
    ("namespace", {"namespace": ("agents",)}, ""),
    ("any of one kind", {"namespace": ("web", "agent?")}, ""),
    (
        "every kind",
        {"namespace": ("agents",), "pod": ("claude-*",), "container": ("agent",), "label": ("app=*",)},
        "",
    ),
    ("any container", {"cgroup": ("*",)}, ""),
    ("the path below the root", {"cgroup": ("kubepods.slice/*/*/cri-containerd-*",)}, ""),
    ("a label's value", {"label": ("app=web", "tier=ai")}, ""),
    ("an empty value", {"label": ("empty=*",)}, ""),
    ("an annotation", {"annotation": ("team.example/owner=ml",)}, ""),
    ("another namespace", {"namespace": ("web",)}, 'select.namespace: found "agents", expected "web"'),
    ("case counts", {"namespace": ("Agents",)}, 'select.namespace: found "agents", expected "Agents"'),
    (
        "one kind of two",
        {"namespace": ("agents",), "pod": ("a", "b")},
        'select.pod: found "claude-0", expected one of',
    ),
    ("not the whole name", {"container": ("age",)}, 'select.container: found "agent", expected "age"'),
    ("another path", {"cgroup": ("system.slice/*",)}, 'select.cgroup: found "kubepods.slice/'),
    (
        "a label's other value",
        {"label": ("app=web",)},
        'select.label: found app = "agent-claude", expected "app=web"',
    ),
    ("a label that is not there", {"label": ("x=*",)}, 'select.label: found no x, expected "x=*"'),
    ("the value of another label", {"label": ("tier=agent-claude",)}, 'select.label: found tier = "ai"'),
    ("a label is no annotation", {"annotation": ("app=*",)}, "select.annotation: found no app"),
    ("nothing given", {}, "selects nothing by itself"),
    ("nothing given, selectable", {"selectable": True}, "only who asks for it gets it"),
]


@pytest.mark.parametrize(("select", "said"), [case[1:] for case in MATCHES], ids=[case[0] for case in MATCHES])
def test_what_a_policy_selects(select, said):
    choice = choose([policy("p", **select)], AGENT)
    [verdict] = choice.verdicts
    assert name(choice) == (None if said else "p")
    assert verdict.taken is not bool(said)
    assert said in f"{verdict.key}: {verdict.text}"
    assert verdict.key == (said.partition(":")[0] if said.startswith("select.") else "")


@pytest.mark.parametrize("key", ["namespace", "pod", "container", "label", "annotation"])
def test_what_is_not_known_matches_nothing(key):
    glob = "app=*" if key in ("label", "annotation") else "*"
    choice = choose([policy("p", **{key: (glob,)})], Container(CGROUP, "c", "u", "burstable"))
    assert choice.policy is None
    assert choice.verdicts[0].key == f"select.{key}"
    assert "found no" in choice.verdicts[0].text


def test_the_first_that_matches_counts_and_the_others_say_why_not():
    policies = [
        policy("web", pod=("web-*",)),
        policy("a", pod=("claude-*",)),
        policy("b", cgroup=("*",)),
        policy("c"),
    ]
    choice = choose(policies, AGENT)
    assert choice.policy is policies[1]
    assert [verdict.line for verdict in choice.verdicts] == [
        'policy web: found "claude-0", expected "web-*"',
        "policy a: taken: the first that matches",
        "policy b: matches, but after policy a",
        "policy c: selects nothing by itself",
    ]
    assert name(choose(policies[::-1], AGENT)) == "b"
    assert choose([], AGENT) == Choice(None, "no policy matches", (), ())


BASE = policy("base", cgroup=("*",))
LEAVE = policy("leave", cgroup=("*",), opt_out=True)
GENTLE = policy("gentle", selectable=True)
WEB = policy("web", selectable=True, namespace=("web",))
MINE = policy("mine", selectable=True, namespace=("agents",))

WISHES = [  # policies, annotation, environment; the policy's name, what is said of wishes that do not count
    ("annotation", [BASE, GENTLE], "gentle", "", "gentle", []),
    ("environment", [BASE, GENTLE], "", "gentle", "gentle", []),
    ("annotation first", [BASE, GENTLE, MINE], "gentle", "mine", "gentle", []),
    ("a wish alone", [GENTLE], "gentle", "", "gentle", []),
    ("for those that it selects", [BASE, MINE], "mine", "", "mine", []),
    ("not selectable", [GENTLE, LEAVE, BASE], "base", "", "leave", ["which is not selectable, expected"]),
    ("not for this one", [BASE, WEB], "web", "", "base", ["not for this container (select.namespace"]),
    ("no such policy", [BASE, GENTLE], "x", "", "base", ['found "x", which is no policy, expected "gentle"']),
    ("nothing to wish for", [BASE], "x", "", "base", ["no policy is selectable here"]),
    ("the next is heard", [BASE, GENTLE], "x", "gentle", "gentle", ['annotation governor.dev/policy: found "x"']),
    ("both in vain", [BASE, GENTLE], "x", "y", "base", ['annotation governor.dev/policy: found "x"', 'found "y"']),
    ("in vain, and no match", [GENTLE], "x", "", None, ["which is no policy"]),
    ("opt out", [LEAVE, BASE, GENTLE], NONE, "", None, []),
    ("opt out by environment", [LEAVE, BASE, GENTLE], "", NONE, None, []),
    ("opt out of nothing", [GENTLE], NONE, "", None, []),
    (
        "opt out of what forbids it",
        [BASE, LEAVE],
        NONE,
        "",
        "base",
        ["opt_out = true in the [select] of policy base"],
    ),
    ("opt out, else that", [BASE, LEAVE, GENTLE], NONE, "gentle", "gentle", ["expected opt_out = true"]),
    ("only its own name", [BASE, GENTLE], "gentl*", "", "base", ['found "gentl*", which is no policy']),
]


@pytest.mark.parametrize("case", WISHES, ids=[case[0] for case in WISHES])
def test_wishes(case):
    _, policies, annotation, environment, chosen, said = case
    choice = choose(policies, wishing(annotation, environment))
    assert name(choice) == chosen
    assert len(choice.refused) == len(said)
    assert all(part in line for part, line in zip(said, choice.refused, strict=True))


def test_a_choice_by_wish_says_so():
    choice = choose([BASE, GENTLE], wishing("gentle", "base"))
    assert choice.reason == 'annotation governor.dev/policy = "gentle"'
    assert [verdict.line for verdict in (*choice.wishes, *choice.verdicts)] == [
        'annotation governor.dev/policy: found "gentle", which it may choose',
        'environment GOVERNOR_POLICY: found "base", not heard: what comes before it counts',
        'policy base: matches first, but annotation governor.dev/policy = "gentle"',
        'policy gentle: taken: annotation governor.dev/policy = "gentle"',
    ]


# Any policies, any container

WORDS = st.sampled_from(["a", "b", "ab", "", "none", "p0", "p1", "p2", "p3"])
GLOBS = st.lists(st.sampled_from(["a", "b", "a*", "*", "?"]), max_size=2).map(tuple)
PAIRS = st.lists(st.sampled_from(["a=a", "a=*", "b=a*"]), max_size=2).map(tuple)
SELECTS = st.builds(Select, GLOBS, GLOBS, GLOBS, GLOBS, PAIRS, PAIRS, st.booleans(), st.booleans())
POLICIES = st.lists(SELECTS, max_size=4).map(
    lambda selects: [Policy(name=f"p{number}", select=select) for number, select in enumerate(selects)]
)
KNOWN = st.dictionaries(st.sampled_from(["a", "b", ANNOTATION]), WORDS)
CONTAINERS = st.builds(
    Container, WORDS, st.just("c"), st.just("u"), st.just("burstable"), WORDS, WORDS, WORDS, WORDS, KNOWN, KNOWN
)


def selects(select: Select, container: Container) -> bool | None:
    """As the keys are documented, written otherwise; None: no key is given."""
    results = [any(fnmatchcase(container.cgroup, glob) for glob in select.cgroup)] if select.cgroup else []
    for globs, text in (
        (select.namespace, container.namespace),
        (select.pod, container.pod),
        (select.container, container.name),
    ):
        if globs:
            results.append(bool(text) and any(fnmatchcase(text, glob) for glob in globs))
    for pairs, known in ((select.label, container.labels), (select.annotation, container.annotations)):
        if pairs:
            results.append(any(fnmatchcase(f"{key}={known[key]}", pair) for key in known for pair in pairs))
    return all(results) if results else None


@given(POLICIES, CONTAINERS)
def test_a_wish_reaches_only_what_is_selectable_and_never_widens_it(policies, container):
    choice = choose(policies, container)
    unasked = choose(policies, replace(container, chosen_policy="", annotations=_without(container)))
    annotated = any(pair.startswith(ANNOTATION) for p in policies for pair in p.select.annotation)
    assert not annotated  # else the annotation could match in its turn
    first = next((p for p in policies if selects(p.select, container)), None)
    assert unasked.policy is first
    if choice.policy is not first:
        assert any(wish.taken for wish in choice.wishes)
        if choice.policy:
            assert choice.policy.select.selectable
            assert choice.policy.name in (container.annotations.get(ANNOTATION), container.chosen_policy)
            assert selects(choice.policy.select, container) is not False
        else:
            assert first.select.opt_out
            assert NONE in (container.annotations.get(ANNOTATION), container.chosen_policy)


def _without(container: Container) -> dict[str, str]:
    return {key: value for key, value in container.annotations.items() if key != ANNOTATION}


@given(POLICIES, CONTAINERS)
def test_the_verdicts_agree_with_the_choice(policies, container):
    choice = choose(policies, container)
    assert [verdict.subject for verdict in choice.verdicts] == [f"policy {p.name}" for p in policies]
    assert [p for p, verdict in zip(policies, choice.verdicts, strict=True) if verdict.taken] == (
        [choice.policy] if choice.policy else []
    )
    assert sum(wish.taken for wish in choice.wishes) <= 1
    for p, verdict in zip(policies, choice.verdicts, strict=True):
        assert bool(verdict.key) == (selects(p.select, container) is False)
        if verdict.key:
            assert getattr(p.select, verdict.key.removeprefix("select."))


# Hostile texts

SELECT_ALL = [
    policy("p", cgroup=("x",)),
    policy("q", namespace=("x",)),
    policy("r", pod=("x",)),
    policy("s", container=("x",)),
    policy("t", label=("a=x",)),
    policy("u", annotation=("a=x",)),
    policy("v", cgroup=("*",), selectable=True),
]


@given(st.text(min_size=1), st.sampled_from([1, 1000]))
def test_no_text_of_a_container_comes_out_raw(text, times):
    text *= times
    container = Container(text, text, text, text, text, text, text, text, {"a": text}, {"a": text, ANNOTATION: text})
    choice = choose(SELECT_ALL, container)
    for line in (choice.reason, *(v.line for v in (*choice.wishes, *choice.verdicts)), *choice.refused):
        assert line.isprintable()
        assert len(line) < 2000


def test_a_mebibyte_of_text_is_judged_quickly_and_told_briefly():
    text = "\x1b[2J\u202e" + "ab" * (1 << 19)
    container = Container(text, text, text, "", text, text, text, text, {"a": text}, {"a": text, ANNOTATION: text})
    globs = ("*a*b*c*d", "*[ab]*[ab]*x", "*?*?*?x")
    policies = [policy("p", label=tuple(f"a={glob}" for glob in globs)), policy("q", pod=globs), *SELECT_ALL]
    begun_ns = time.process_time_ns()
    choice = choose(policies, container)
    assert time.process_time_ns() - begun_ns < 2_000_000_000
    assert all(v.line.isprintable() and len(v.line) < 2000 for v in (*choice.wishes, *choice.verdicts))
