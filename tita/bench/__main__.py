"""`python -m tita.bench` is what the benchmark CronJob runs."""

import sys

from tita.bench.job import main
from tita.errors import TitaError
from tita.settings import settings
from tita.terminal import configure_logging

if __name__ == "__main__":
    try:
        configure_logging(settings().log_level)
        main()
    except TitaError as error:
        print(f"benchmark: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
