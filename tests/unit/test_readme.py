"""What the README shows of scripts/wiring is there, and each line of its threat model names tests that there are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("file", "begin"),
    [
        ("Containerfile", "ENTRYPOINT"),
        ("pod-hook.yaml", "command: [sh"),
        ("pod-hook.yaml", "shareProcessNamespace"),
        ("agent.service", "KillMode=mixed"),
        ("agent.service", "OOMPolicy=continue"),
    ],
)
def test_lines_of_the_wiring_files_are_shown_as_they_are(file, begin):
    lines = [line.strip() for line in (ROOT / "scripts" / "wiring" / file).read_text().splitlines()]
    [line] = [line for line in lines if line.startswith(begin)]
    assert line in (ROOT / "README.md").read_text()


def test_every_wiring_file_is_named():
    readme = (ROOT / "README.md").read_text()
    assert [path.name for path in (ROOT / "scripts" / "wiring").iterdir() if path.name not in readme] == []


def threats():
    """What a hostile container may try, and by line what shows that it is stopped."""
    text = (ROOT / "README.md").read_text().partition("### What a hostile container may try\n")[2].partition("\n#")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {tried.strip(): shown.strip() for tried, _, shown in rows[2:]}


@pytest.mark.parametrize("tried", threats())
def test_each_line_of_the_threat_model_has_its_tests(tried):
    named = re.findall(r"`(test_\w+\.py)`: ([^`]+)", threats()[tried])
    assert named
    for file, parts in named:
        there = " ".join(
            name
            for path in (ROOT / "tests").glob(f"*/{file}")
            for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
        )
        for part in parts.strip(" ;").split("; "):
            assert re.search(rf"\btest_\w*{part.replace(' ', '_')}", there), f"{file}: {part}"


def test_the_threat_model_is_not_empty():
    assert len(threats()) > 20
