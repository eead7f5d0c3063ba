"""The FastAPI application: APIs, health probes, metrics, and the page at `/`."""

from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from tita import __version__
from tita.serve import completions_api, llava_api, openai_api, tokenizer_api
from tita.serve.async_engine import AsyncEngine
from tita.serve.errors import install_handlers
from tita.serve.middleware import AuthMiddleware, BodyBudget, BodyTurns
from tita.serve.model_cards import DIGEST_HEADER
from tita.serve.request_fields import IGNORED_HEADER

STATIC = Path(__file__).parent / "static"

# The page may run its own script, show images given to it, and connect to this server only.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without FastAPI's status 422: invalid bodies get 400 here."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
    return app.openapi_schema or {}


def create_app(engine: AsyncEngine) -> FastAPI:
    """Create the application for an engine, which may still be loading its models."""
    options = engine.options
    app = FastAPI(
        title="tita",
        version=__version__,
        # With `root_path`, Starlette expects the prefix in every path; most proxies remove it.
        servers=[{"url": options.root_path}] if options.root_path else None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    install_handlers(app)
    app.openapi = partial(_openapi, app)  # type: ignore[method-assign]
    app.state.api_paths = []
    for api in (openai_api, completions_api, tokenizer_api, llava_api):
        router = api.create_router(engine)
        app.include_router(router)
        app.state.api_paths += [route.path for route in router.routes if isinstance(route, Route)]

    # `/health` is vLLM's path, which load generators and routers use.
    @app.get("/health", response_class=JSONResponse, include_in_schema=False)
    @app.get("/healthz", response_class=JSONResponse)
    async def healthz() -> Response:
        """Liveness: 200 unless the process must be restarted."""
        status = 200 if engine.healthy else 500
        return JSONResponse({"status": "ok" if status == 200 else "dead"}, status_code=status)

    @app.get("/readyz", response_class=JSONResponse)
    async def readyz() -> Response:
        """Readiness: 200 from when the models are loaded and warmed up until SIGTERM."""
        error = engine.unavailable
        return JSONResponse({"status": "ready"}) if error is None else error.response()

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(
            engine.metrics.text(), headers={"content-type": engine.metrics.content_type}
        )

    if options.page:
        html = (STATIC / "index.html").read_text(encoding="utf-8")
        # Without a known prefix, the page looks for its files beside itself.
        prefix = f"{options.root_path}/" if options.root_path else ""

        @app.get("/", include_in_schema=False)
        async def page() -> HTMLResponse:
            return HTMLResponse(html.replace("{prefix}", prefix), headers=_PAGE_HEADERS)

        app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_middleware(
        AuthMiddleware,
        keys=options.keys,
        max_body_bytes=options.limits.max_body_bytes,
        body_timeout_s=options.deadline_s,
        root_path=options.root_path,
        bodies=BodyBudget(options.max_bodies_bytes),
        turns=BodyTurns(),
        unavailable=lambda: engine.unavailable,
        count_refusal=engine.metrics.count_refusal,
    )
    if options.allow_origins:
        # Outside the authentication: browsers send preflight requests without a key, and need the
        # CORS headers to read error responses.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allow_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after", DIGEST_HEADER, IGNORED_HEADER),
        )
    return app
