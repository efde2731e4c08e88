"""A journal's lines, while governor writes them and after it was killed."""

import itertools
import json


def lines_of(path):
    """Those that are whole; none where there is no journal yet."""
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    return [line for line in itertools.starmap(_parsed, itertools.pairwise([*whole, b""])) if line]


def _parsed(line, following):
    """None for half a line, as a killed governor may leave before the next one begins."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        assert b'"kind":"begin"' in following, line
        return None
