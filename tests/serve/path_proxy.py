"""A reverse proxy that serves a server below a path prefix."""

import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route


@contextmanager
def proxied(upstream: str, prefix: str, *, strip: bool) -> Iterator[str]:
    """URL of the prefix at a proxy for `upstream`, which removes the prefix if `strip`."""
    client = httpx.AsyncClient(timeout=60)

    async def forward(request: Request) -> Response:
        path = request.url.path
        if not path.startswith(prefix):
            return Response("another application", status_code=404)
        path = path.removeprefix(prefix) if strip else path
        headers = {k: v for k, v in request.headers.items() if k not in ("host", "content-length")}
        sent = client.build_request(
            request.method, upstream + path, headers=headers, content=await request.body()
        )
        got = await client.send(sent, stream=True)

        async def chunks() -> AsyncIterator[bytes]:
            async for chunk in got.aiter_raw():
                yield chunk
            await got.aclose()

        kept = {k: v for k, v in got.headers.items() if k != "transfer-encoding"}
        return StreamingResponse(chunks(), status_code=got.status_code, headers=kept)

    app = Starlette(routes=[Route("/{path:path}", forward, methods=["GET", "POST"])])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}{prefix}"
    finally:
        server.should_exit = True
        thread.join()
