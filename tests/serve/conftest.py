"""A server for the tests that ask only what leaves it as it was."""

import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

# Tests are imported one by one, without packages: this makes `serve_process` one module for all.
sys.path.insert(0, str(Path(__file__).parent))

from serve_process import Server, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server that is asked only what leaves it as it was."""
    with serving() as running:
        yield running.ready()


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return server.client()
