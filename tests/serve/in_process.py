"""A server in the test's process, for tests that observe its models."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn

from tita.serve import ServeOptions
from tita.serve.app import create_app
from tita.serve.async_engine import AsyncEngine
from tita.serve.model_loading import LoadedModels
from tita.vlm.image_fetcher import ImageFetcher


@contextmanager
def hosted(
    models: LoadedModels,
    options: ServeOptions | None = None,
    *,
    fetcher: ImageFetcher | None = None,
) -> Iterator[httpx.Client]:
    """An HTTP client of a server with these models, on a free port."""
    engine = AsyncEngine(options or ServeOptions(), fetcher=fetcher)
    engine.load(models)
    server = uvicorn.Server(uvicorn.Config(create_app(engine), port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
        engine.stop()
