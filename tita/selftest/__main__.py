"""Entry point of the self-test's job: `python -m tita.selftest`."""

import sys

from tita.errors import ExitCode, TitaError
from tita.selftest.run import run_and_publish
from tita.terminal import configure_logging, say


def main() -> int:
    """Check this machine's devices; the result is in `selftest-out`, and in a pod in the store."""
    configure_logging()
    try:
        failed = run_and_publish()
    except TitaError as error:
        say(f"selftest: {error}")
        return error.exit_code
    return ExitCode.FAILED if failed else ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
