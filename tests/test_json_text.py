"""Everything that others read as JSON is JSON, whatever the numbers are."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tita.json_text import dump_json
from tita.terminal import Output, emit


def test_numbers_that_are_not_finite_are_null() -> None:
    value = {
        "a": math.nan, "b": [math.inf, (1.5, -math.inf)], "c": {"d": np.float64("nan")}, 2.5: "NaN",
    }  # fmt: skip
    wanted = {"a": None, "b": [None, [1.5, None]], "c": {"d": None}, "2.5": "NaN"}
    assert json.loads(dump_json(value)) == wanted
    assert dump_json({"a": 1.0, "ö": "ü"}, ensure_ascii=False) == '{"a": 1.0, "ö": "ü"}'
    assert dump_json([Path("a"), math.nan], default=str) == '["a", null]'


def test_results_in_the_terminal_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    emit([{"loss": math.nan, "step": 1}], output=Output.JSON)
    assert json.loads(capsys.readouterr().out) == [{"loss": None, "step": 1}]
    emit([{"loss": math.inf}], output=Output.YAML)
    assert capsys.readouterr().out == "- loss: null\n"
    emit([{"loss": math.nan}])
    assert "nan" in capsys.readouterr().out
