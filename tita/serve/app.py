"""The HTTP application, put together."""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

from tita import __version__
from tita.serve import errors, llava_api, openai_api
from tita.serve.async_engine import AsyncEngine
from tita.serve.middleware import AuthMiddleware

STATIC = Path(__file__).parent / "static"

# The page runs its own script, shows images that it was given, and speaks to nobody else.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def create_app(serving: AsyncEngine) -> FastAPI:
    """The application around a server's state, which may still be loading."""
    app = FastAPI(
        title="tita", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    errors.install(app)
    app.include_router(openai_api.router(serving))
    app.include_router(llava_api.router(serving))
    _add_probes(app, serving)
    if serving.options.page:
        _add_page(app)
    app.add_middleware(
        AuthMiddleware,
        keys=serving.options.keys,
        max_body_bytes=serving.options.limits.max_body_bytes,
        # Nothing could be answered in time that takes longer.
        body_within_s=serving.options.deadline_s,
        closed=lambda: serving.closed,
    )
    if serving.options.allow_origins:
        # Outside of the gate: a browser asks leave without a key, and reads refusals only with it.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=serving.options.allow_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
        )
    return app


def _add_probes(app: FastAPI, serving: AsyncEngine) -> None:
    # vLLM's name of it is what load generators and routers ask.
    @app.get("/health", response_class=JSONResponse, include_in_schema=False)
    @app.get("/healthz", response_class=JSONResponse)
    async def healthz() -> Response:
        """Alive: 200 as long as this process is worth keeping."""
        status = 200 if serving.healthy else 500
        return JSONResponse({"status": "ok" if status == 200 else "dead"}, status_code=status)

    @app.get("/readyz", response_class=JSONResponse)
    async def readyz() -> Response:
        """Ready: 200 once both models are loaded and warm, until SIGTERM."""
        closed = serving.closed
        return JSONResponse({"status": "ready"}) if closed is None else closed.response()

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(
            serving.metrics.text(), headers={"content-type": serving.metrics.content_type}
        )


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers=_PAGE_HEADERS)

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
