"""POST /v1/embeddings and POST /detect: pictures as vectors, and the objects in a picture. No torch of its own."""

import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
from fastapi import APIRouter

from nanochat.serving.models import Limits, Models
from nanochat.serving.problems import ApiError
from nanochat.serving.prompts import picture_at
from nanochat.serving.schema import DetectRequest, EmbeddingsRequest, ImagePart
from nanochat.serving.seen import opened
from nanochat.serving.sources import Sources

PICTURES = ("data:", "http:", "https:", "file:")


def embedding_router(models: Models, sources: Sources, limits: Limits, detector: Any | None) -> APIRouter:
    """detector: an encoder with `detect`, or None."""
    router, worker = APIRouter(tags=["pictures"]), ThreadPoolExecutor(1)

    @router.post("/v1/embeddings", summary="A vector for each picture")
    async def embeddings(body: EmbeddingsRequest):
        """The mean over the vision vectors that the model sees of a picture. Texts have no vectors in these models."""
        served = models.find(body.model)
        if not served.agent.places_per_image:
            raise ApiError(400, "this is a text model: it cannot look at pictures", "model")
        given = body.input if isinstance(body.input, list) else [body.input]
        rows = []
        for i, each in enumerate(given):
            data = await picture_at(picture_url(each, i), sources, f"input.{i}")
            vectors = as_array(await served.batcher.look([data]))[0]  # (N, D)
            rows.append(
                {"object": "embedding", "index": i, "embedding": encoded(vectors.mean(0), body.encoding_format)}
            )
        return {"object": "list", "data": rows, "model": served.name, "usage": {"prompt_tokens": 0, "total_tokens": 0}}

    @router.post("/detect", summary="The objects in a picture")
    async def detect(body: DetectRequest):
        """Boxes are x1, y1, x2, y2 in pixels of the picture."""
        if detector is None:
            raise ApiError(503, "this server has no detector: start it with --detect yolov9t.pt", code="no_detector")
        data = await picture_at(body.image, sources, "image")

        def found() -> list[dict]:
            return [
                asdict(each)
                for each in detector.detect(opened(data, "the picture", limits.max_pixels), conf=body.conf or 0.25)
            ]

        return {"objects": await asyncio.get_running_loop().run_in_executor(worker, found)}

    return router


def picture_url(given: str | ImagePart, number: int) -> str:
    """Raises ApiError for a text."""
    url = given.url if isinstance(given, ImagePart) else given
    if isinstance(given, str) and not given[:6].lower().startswith(PICTURES):
        raise ApiError(
            400, f"input.{number} is a text, and these models make vectors of pictures only: send a picture as "
            "data:image/png;base64,...", f"input.{number}", "text_unsupported",
        )  # fmt: skip
    return url


def as_array(vectors: Any) -> np.ndarray:
    return np.asarray(vectors.cpu() if hasattr(vectors, "cpu") else vectors, np.float32)


def encoded(vector: np.ndarray, encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
