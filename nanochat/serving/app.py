"""One HTTP app for words, pictures and actions: the routes, and what is around them. No torch."""

from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from starlette.responses import Response

from nanochat import __version__
from nanochat.serving import problems
from nanochat.serving.actions import actions_router
from nanochat.serving.attending import attention_router
from nanochat.serving.chat import chat_router
from nanochat.serving.embedding import embedding_router
from nanochat.serving.guard import Entrance, Guard
from nanochat.serving.metrics import Metrics
from nanochat.serving.models import Limits, Models
from nanochat.serving.openpi import MAX_CLIENTS, RobotPolicy, Run
from nanochat.serving.responses import responses_router
from nanochat.serving.simulation import can_simulate, simulation_router
from nanochat.serving.sources import Sources

PAGE = Path(__file__).parent / "page"
# The page loads nothing from elsewhere, and no other page may frame it
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(
    models: Models, sources: Sources, limits: Limits, entrance: Entrance, policy: RobotPolicy | None = None,
    run: Run | None = None, max_clients: int = MAX_CLIENTS, detector=None,
) -> Guard:  # fmt: skip
    """The ASGI app. Closing it (its lifespan) ends the threads of the models. policy, run: of a robot, see `actions_router`.
    detector: see `embedding_router`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        models.close()

    app = FastAPI(
        title="nanochat", version=__version__, description="Pictures, words and actions of small models.",
        lifespan=lifespan, docs_url=None, redoc_url=None,
    )  # fmt: skip
    problems.install(app)
    metrics = Metrics(models)
    app.include_router(chat_router(models, sources, limits))
    app.include_router(responses_router(models, sources, limits))
    app.include_router(embedding_router(models, sources, limits, detector))
    app.include_router(attention_router(models, sources, limits))
    app.include_router(actions_router(policy, run, sources, limits, max_clients))

    if can_simulate(policy):
        app.include_router(simulation_router(policy, run))

    @app.get("/v1/models", tags=["models"], summary="The models that are served, and what each can do")
    async def list_models():
        return {"object": "list", "data": [served.described() for served in models.served.values()]}

    @app.get("/v1/models/{name}", tags=["models"], summary="One model")
    async def one_model(name: str):
        return models.find(name).described()

    @app.get("/health", tags=["server"], summary="Whether the server answers")
    async def health():
        return {"status": "ok"}

    @app.get("/healthz", include_in_schema=False)
    async def healthz():
        return PlainTextResponse("OK\n")

    @app.get("/metrics", tags=["server"], summary="Counters for Prometheus", response_class=PlainTextResponse)
    async def show_metrics():
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page():
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    @app.get("/page-settings", include_in_schema=False)
    async def page_settings():
        return {"detects": detector is not None, "simulates": can_simulate(policy)}

    @app.get("/docs", include_in_schema=False)
    async def docs():
        return FileResponse(PAGE / "docs.html", headers=PAGE_HEADERS)

    app.mount("/page", PageFiles(directory=PAGE))
    return Guard(app, entrance, metrics.count)


class PageFiles(StaticFiles):
    def file_response(self, *args, **kwargs) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(PAGE_HEADERS)
        return response
