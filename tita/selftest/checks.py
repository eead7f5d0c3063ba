"""Runs the checks of a self-test one by one, within a time budget, and records how each ended."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

logger = logging.getLogger(__name__)

Outcome = Literal["passed", "failed", "skipped"]
Group = Literal["right", "fast", "fits"]
Figures = Mapping[str, float]
"""Measured figures by name; the names contain their units."""


class CheckFailed(Exception):
    """A result is wrong; the message says which one, with both values."""


class NotHere(Exception):
    """The check cannot run on this machine; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check."""

    name: str
    group: Group
    about: str
    """What holds if it passes."""
    run: Callable[[], Figures]
    """Raises `CheckFailed` or `NotHere`; any other exception is a failure, too."""
    expected_s: float = 10.0
    """Seconds that must be left for it to begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """How a check ended."""

    name: str
    group: Group
    about: str
    outcome: Outcome
    detail: str = ""
    """Why it failed or was skipped."""
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As in `selftest.json`."""
        return asdict(self)


def run_checks(checks: Sequence[Check], *, budget_s: float) -> Iterator[CheckResult]:
    """Run checks in order.

    Args:
        budget_s: a check that would end later than this after the first one began is skipped.

    Yields:
        The result of each check, as it ends.
    """
    began = time.monotonic()
    for check in checks:
        left_s = budget_s - (time.monotonic() - began)
        if left_s < check.expected_s:
            reason = f"{left_s:.0f} s are left and it takes about {check.expected_s:.0f} s"
            yield _result(check, "skipped", detail=f"{reason}; give more --minutes")
            continue
        started = time.monotonic()
        outcome: Outcome = "passed"
        detail, figures = "", {}
        try:
            figures = {name: float(value) for name, value in check.run().items()}
        except NotHere as reason:
            outcome, detail = "skipped", str(reason)
        except CheckFailed as fault:
            outcome, detail = "failed", str(fault)
        except Exception as error:
            # Any exception of a kernel, a library or a driver is what this command looks for.
            logger.debug("check %s", check.name, exc_info=True)
            first_line = (str(error).strip().splitlines() or [""])[0]
            outcome, detail = "failed", f"{type(error).__name__}: {first_line}"
        yield _result(
            check, outcome, detail=detail, figures=figures, seconds=time.monotonic() - started
        )


def _result(check: Check, outcome: Outcome, **more: Any) -> CheckResult:
    return CheckResult(
        name=check.name, group=check.group, about=check.about, outcome=outcome, **more
    )
