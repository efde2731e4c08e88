"""The profile of the stand-in resumable.py, whose files are in one directory."""

import json
import sys
from pathlib import Path

FAKE = Path(__file__).with_name("resumable.py")
PROFILE = r"""
[match]
process = ["resumable.py"]
[state_file]
path = "{directory}/{{pid}}.json"
session = "sessionId"
start = "procStart"
status = "status"
idle = ["idle"]
busy = ["busy"]
[screen]
prompt = '^agent> ?(?P<draft>[^\n]*)\Z'
[signals]
compact = "SIGUSR1"
[session]
globs = ["{directory}/*.jsonl"]
compact_stopped = {compact}
compact_refused = {refused}
resume = {resume}
keep_options = ["--model <model>", "--fast", "--dir <path...>"]
resubmit = "{resubmit}"
"""
USELESS = """
resume_peak = "{peak}"
[efficacy]
compact = "useless"
"""


def command(directory: Path) -> list[str]:
    """What starts it."""
    return [sys.executable, str(FAKE), str(directory)]


def profile(directory: Path, compacts: bool = True, peak: str = "", resubmit: str = "") -> str:
    """`compacts`: it can compact a stopped session; `peak`: and nothing else frees memory, so it is recycled."""
    start = [*command(directory), "{options}"]
    lists = {
        "resume": [*start, "--resume", "{session}"],
        "compact": [*start, "--compact", "{session}"] if compacts else [],
        "refused": ['"too short"'] if compacts else [],
    }
    text = PROFILE + (USELESS if peak else "")
    words = {name: json.dumps(words) for name, words in lists.items()}
    return text.format(directory=directory, resubmit=resubmit, peak=peak, **words)
