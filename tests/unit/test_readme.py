"""What the README shows of scripts/wiring is what is there, and what tests/wiring runs."""

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
