"""`python -m tita` is the `tita` command."""

from tita.cli.main import tita

if __name__ == "__main__":
    tita()
