"""Which policy a container gets, and why. Pure: a container and the policies in their order in, a choice out.

A pod may wish for a policy: by its annotation governor.dev/policy, then by GOVERNOR_POLICY in the container's
environment. Whoever may create a pod writes both, so a wish counts only where the operator allowed it: for a policy
that is `selectable` and whose other keys of [select] match, or for "none" where the first policy that matches has
`opt_out`. A wish that does not count is reported, and the next is heard; then the first policy that matches counts. A
policy that gives no key matches nobody by itself: what is not selected is not governed.

Every text of a verdict is bounded and holds nothing that could steer a terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile

from governor.container import Container
from governor.policy import Policy, Select
from governor.policy_keys import shown

ANNOTATION = "governor.dev/policy"
ENVIRONMENT = "GOVERNOR_POLICY"
NONE = "none"  # as a wish: not to be governed

_ROOT = "/sys/fs/cgroup/"
_LISTED = 5

_Failed = tuple[str, str] | None  # the first key that does not match, and what it found and expected


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one wish, or of one policy in its turn."""

    subject: str  # "annotation governor.dev/policy", "environment GOVERNOR_POLICY" or "policy NAME"
    taken: bool
    text: str  # what was found, what was expected
    key: str = ""  # the first that does not match, as select.namespace

    @property
    def line(self) -> str:
        """For people."""
        return f"{self.subject}: {self.text}"


@dataclass(frozen=True, slots=True)
class Choice:
    """The policy of a container; None: it is not governed."""

    policy: Policy | None
    reason: str
    wishes: tuple[Verdict, ...]  # in the order in which they are heard
    verdicts: tuple[Verdict, ...]  # one per policy, in their order

    @property
    def refused(self) -> tuple[str, ...]:
        """The wishes that do not count, to be said where the choice is made."""
        return tuple(wish.line for wish in takewhile(lambda wish: not wish.taken, self.wishes))


def is_given(select: Select) -> bool:
    """Whether it selects by anything at all."""
    return any((select.cgroup, select.namespace, select.pod, select.container, select.label, select.annotation))


def choose(policies: Sequence[Policy], container: Container) -> Choice:
    """The policy for a container; `policies` in their order, no two of one name."""
    judged = [(policy, _failing(policy.select, container)) for policy in policies]
    fitting = [policy for policy, failed in judged if not failed]
    first = next((policy for policy in fitting if is_given(policy.select)), None)

    chosen, reason = first, "the first that matches" if first else "no policy matches"
    wishes: list[Verdict] = []
    for subject, wish in _wishes(container):
        refusal = _refusal(wish, judged, first)
        if any(earlier.taken for earlier in wishes):
            refusal = "not heard: what comes before it counts"
        elif not refusal:
            chosen = next((policy for policy in fitting if policy.name == wish), None)
            reason = f"{subject} = {shown(wish)}"
        text = f"found {shown(wish)}, {refusal}" if refusal else f"found {shown(wish)}, which it may choose"
        wishes.append(Verdict(subject, not refusal, text))

    verdicts = []
    for policy, failed in judged:
        key, text = failed or ("", _standing(policy, chosen, reason, first))
        verdicts.append(Verdict(f"policy {policy.name}", policy is chosen, text, key))
    return Choice(chosen, reason, tuple(wishes), tuple(verdicts))


def _wishes(container: Container) -> list[tuple[str, str]]:
    said = [
        (f"annotation {ANNOTATION}", container.annotations.get(ANNOTATION, "")),
        (f"environment {ENVIRONMENT}", container.chosen_policy),
    ]
    return [(subject, wish) for subject, wish in said if wish]


def _refusal(wish: str, judged: list[tuple[Policy, _Failed]], first: Policy | None) -> str:
    """Why a wish does not count; "" where it does."""
    if wish == NONE:
        if first is None or first.select.opt_out:
            return ""
        return f"expected opt_out = true in the [select] of policy {first.name}"
    open_to_it = []
    found = "which is no policy"
    for policy, failed in judged:
        if policy.select.selectable and not failed:
            open_to_it.append(policy.name)
        if policy.name != wish:
            continue
        if not failed and policy.select.selectable:
            return ""
        found = "which is not selectable"
        if policy.select.selectable and failed:
            found = f"which is not for this container ({failed[0]}: {failed[1]})"
    return f"{found}, expected {_one_of(open_to_it) or 'no wish: no policy is selectable here'}"


def _standing(policy: Policy, chosen: Policy | None, reason: str, first: Policy | None) -> str:
    """What is said of a policy whose given keys all match."""
    if policy is chosen:
        return f"taken: {reason}"
    if not is_given(policy.select):
        return "selects nothing by itself" + (", only who asks for it gets it" if policy.select.selectable else "")
    if policy is first:
        return f"matches first, but {reason}"
    assert first is not None
    return f"matches, but after policy {first.name}"


def _failing(select: Select, container: Container) -> _Failed:
    """The first key that does not match, and what it found and expected; None where all do."""
    texts = (
        ("cgroup", select.cgroup, container.cgroup.removeprefix(_ROOT)),
        ("namespace", select.namespace, container.namespace),
        ("pod", select.pod, container.pod),
        ("container", select.container, container.name),
    )
    for key, globs, text in texts:
        # A name that is not known matches nothing, not even "*"; a path every container has.
        known = text or key == "cgroup"
        if globs and not (known and any(fnmatchcase(text, glob) for glob in globs)):
            return f"select.{key}", f"found {shown(text) if text else 'nothing known'}, expected {_one_of(globs)}"
    for key, pairs, there in (
        ("label", select.label, container.labels),
        ("annotation", select.annotation, container.annotations),
    ):
        if pairs and not any(_has(there, *_split(pair)) for pair in pairs):
            return f"select.{key}", f"found {_found(there, pairs)}, expected {_one_of(pairs)}"
    return None


def _split(pair: str) -> tuple[str, str]:
    key, _, glob = pair.partition("=")
    return key, glob


def _has(there: Mapping[str, str], key: str, glob: str) -> bool:
    return key in there and fnmatchcase(there[key], glob)


def _found(there: Mapping[str, str], pairs: tuple[str, ...]) -> str:
    """What stands under the keys that the policy asks for."""
    if not there:
        return "none at all (they are known only where the runtime's socket is)"
    keys = list(dict.fromkeys(_split(pair)[0] for pair in pairs))
    more = f", and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(f"{key} = {shown(there[key])}" if key in there else f"no {key}" for key in keys[:_LISTED]) + more


def _one_of(texts: Sequence[str]) -> str:
    """Nothing, "a", or one of "a", "b"; bounded."""
    more = f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
    listed = ", ".join(shown(text) for text in texts[:_LISTED])
    return listed if len(texts) <= 1 else f"one of {listed}{more}"
