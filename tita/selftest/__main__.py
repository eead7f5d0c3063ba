"""Entry point of the self-test without a terminal: `python -m tita.selftest`."""

import sys
from pathlib import Path

from tita.errors import ExitCode, TitaError
from tita.selftest.result_page import verdict
from tita.selftest.run import run_selftest
from tita.terminal import configure_logging, say


def main() -> int:
    """Check the devices of this machine, and write the result to `selftest-out`."""
    configure_logging()
    try:
        results = run_selftest(Path("selftest-out"), device=None, minutes=8)
    except TitaError as error:
        say(f"selftest: {error}")
        return error.exit_code
    say(f"selftest: {verdict(results)}")
    failed = any(result.outcome == "failed" for result in results)
    return ExitCode.FAILED if failed else ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
