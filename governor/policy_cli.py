"""`governor policy`: check, show and list policies."""

from __future__ import annotations

from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from governor import policy_directory, policy_explain, policy_file
from governor.cli_common import JsonOption, by_table, fail, load_or_exit, out, say_faults
from governor.container import Container
from governor.journal import printable
from governor.policy_directory import PoliciesError
from governor.policy_file import Loaded, PolicyError
from governor.policy_keys import KEYS, Key, flatten, written
from governor.selection import choose
from governor.watch_place import HOST_ROOT

policy_app = typer.Typer(help="Check, show, list and explain policies.", no_args_is_help=True)
_NOT_GOVERNED = 3

PolicyArgument = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A preset's name, or a policy file.")]


@policy_app.command()
def check(
    policies: Annotated[
        list[str], typer.Argument(metavar="NAME|FILE|DIRECTORY...", help="Presets, files, or directories of a node.")
    ],
) -> None:
    """Print every fault of policies, one a line; exits 2 if there is one.

    Example: governor policy check agent.toml /etc/governor/policies
    """
    good = True
    for policy in policies:
        try:
            found = _loaded(policy)
            if not found:
                out(f"{policy}: no policy is in it (*.toml): nothing would be governed")
            for where, loaded in found.items():
                out(f"{where}: good: policy {loaded.policy.name}")
        except PoliciesError as error:
            good = False
            for each in error.errors:
                say_faults(each)
    if not good:
        raise typer.Exit(2)


def _loaded(policy: str) -> policy_directory.Policies:
    """What a preset, a file or a directory holds; raises PoliciesError."""
    if policy not in policy_file.presets() and Path(policy).is_dir():
        return policy_directory.load(Path(policy))
    try:
        return {policy: policy_file.load(policy)}
    except PolicyError as error:
        raise PoliciesError([error]) from None


@policy_app.command()
def explain(
    pod: Annotated[
        str,
        typer.Argument(
            metavar="[POD]", help="NAMESPACE/POD[/CONTAINER], a cgroup, or the begin of a container's id."
        ),
    ] = "",
    described: Annotated[
        str, typer.Option("--as", metavar="FILE", help="Instead the container that this JSON object describes.")
    ] = "",
    policies: Annotated[
        Path, typer.Option(metavar="DIRECTORY", help="The policies to choose from.")
    ] = policy_directory.DIRECTORY,
    host_root: Annotated[
        str, typer.Option(envvar=HOST_ROOT, help="Where the files of the node are, as its container runtime's.")
    ] = "/",
    json: JsonOption = False,
) -> None:
    """Say which policy a container gets, which wishes of its pod count, and why the other policies are not for it.

    The fields of --as, all optional: cgroup, container_id, pod_uid, qos, namespace, pod, name, chosen_policy (what
    GOVERNOR_POLICY in its environment says), and the objects labels and annotations.

    Exits 0 if it is governed (of a pod: one of its containers), 3 if not, 2 for bad policies or a bad description.

    Example: governor policy explain agents/claude-0
    """
    if bool(pod) == bool(described):
        fail("expected either a POD or --as FILE", 2)
    try:
        known = policy_directory.load(policies)
    except PoliciesError as error:
        for each in error.errors:
            say_faults(each)
        raise typer.Exit(2) from None
    containers = [load_or_exit(policy_explain.read_container, described)] if described else _found(pod, host_root)
    governed = False
    for container in containers:
        choice = choose([loaded.policy for loaded in known.values()], container)
        governed = governed or choice.policy is not None
        if json:
            typer.echo(dumps(policy_explain.as_object(container, choice, known)))
            continue
        for line in policy_explain.answer(container, choice, known):
            out(line)
    if not governed:
        raise typer.Exit(_NOT_GOVERNED)


def _found(pod: str, host_root: str) -> list[Container]:
    """The containers that are meant, with all that can be known of them; exits where there is none."""
    from governor import node_containers

    root = node_containers.root()
    here = node_containers.containers(root, host_root)
    if not (meant := node_containers.named(here, pod)):
        fail(
            f"found no container {pod!r} among {len(here)} below {root}, expected NAMESPACE/POD[/CONTAINER], "
            "the path of a cgroup, or 6 characters or more that a container's id begins with",
            2,
        )
    meant, unknown = node_containers.with_labels(meant, host_root)
    if unknown:
        typer.echo(printable(f"governor: labels and annotations are not known: {unknown}"), err=True)
    return meant


@policy_app.command()
def show(
    policy: PolicyArgument = "default",
    json: Annotated[bool, typer.Option("--json", help="Print JSON, with units in the names.")] = False,
) -> None:
    """Print the effective policy, and where each value comes from; the output is a policy file itself.

    Example: governor policy show seed > policy.toml
    """
    loaded = load_or_exit(policy_file.load, policy)
    if json:
        found = {"policy": asdict(loaded.policy), "sources": loaded.sources}
        # Not orjson: it leaves some control characters as they are, and refuses a path that is not UTF-8.
        typer.echo(dumps(found, default=lambda member: member.value))
        return
    for line in as_toml(loaded):
        out(line)


@policy_app.command("list")
def list_presets() -> None:
    """Print the policies that come with governor."""
    for name, path in policy_file.presets().items():
        first = path.read_text().partition("\n")[0]
        out(f"{name:10} {first.lstrip('# ')}")


def as_toml(loaded: Loaded) -> list[str]:
    """Lines of a policy file that is read as the same policy, each key with its source."""
    values = flatten(loaded.policy)

    def line(path: str, key: Key) -> str:
        return f"{f'{key.name} = {written(key, values[path])}':40}  # {printable(loaded.sources[path])}"

    return by_table(KEYS, line)
