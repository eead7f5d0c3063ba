"""A job's progress lines: one JSON object a line, among all the others that it logs."""

import json
from dataclasses import fields

from tita.records import TrainProgress

_NAMES = {field.name for field in fields(TrainProgress)}


def read_progress(line: str) -> TrainProgress | None:
    """The record in this line of a log, or None if there is none."""
    if '"progress"' not in line:
        return None
    start = line.find("{")  # torchrun may put the rank before it
    try:
        found = json.loads(line[start:])["progress"]
        return TrainProgress(**{name: found[name] for name in _NAMES & found.keys()})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
