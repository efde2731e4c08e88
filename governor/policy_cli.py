"""`governor policy`: check, show and list policies."""

from __future__ import annotations

from dataclasses import asdict
from json import dumps
from typing import Annotated

import typer

from governor import policy_file
from governor.cli_common import by_table, load_or_exit, out
from governor.journal import printable
from governor.policy_file import Loaded
from governor.policy_keys import KEYS, Key, flatten, written

policy_app = typer.Typer(help="Check, show and list policies.", no_args_is_help=True)

PolicyArgument = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A preset's name, or a policy file.")]


@policy_app.command()
def check(policy: PolicyArgument) -> None:
    """Print every fault of a policy, one a line; exits 2 if there is one.

    Example: governor policy check /etc/governor/policy.toml
    """
    loaded = load_or_exit(policy_file.load, policy)
    out(f"{policy}: good: policy {loaded.policy.name}")


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
