"""What a server answers: the Open Inference Protocol, uploads of feature files, status, metrics, and the page."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib import resources
from typing import Any, TypeVar

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from runtime.backends.base import Backend
from runtime.backends.registry import runs_on_gpu
from runtime.errors import RequestError
from runtime.localizer import Localizer
from runtime.machine import library_versions, usable_cores
from runtime.pipeline import Pipeline, Video
from runtime.records import BadRecord, check_video_id
from runtime.schema import quote, require
from runtime.serving.batcher import Batcher, Times
from runtime.serving.bodies import Bodies, Disconnected
from runtime.serving.contexts import Contexts
from runtime.serving.extraction import Extractions
from runtime.serving.guard import Guard
from runtime.serving.metrics import Metrics
from runtime.serving.models import (
    LOCALIZER,
    NETWORK,
    VERSION,
    Model,
    TensorJob,
    VideoJob,
    check_seconds,
    event_outputs,
    localizer_model,
    localizer_source,
    network_job,
    network_model,
    run_tensors,
    run_videos,
)
from runtime.serving.options import ServerOptions
from runtime.serving.protocol import EXTENSIONS, HEADER_LENGTH, Array, infer_response, parse_infer
from runtime.serving.uploads import features_of_files, parse_form, unpack_npz
from runtime.serving.videos import VideoEndpoint, wait_for_disconnect
from runtime.spec import LOGITS, OFFSETS

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page is one file, and talks to this server alone."""

J = TypeVar("J", VideoJob, TensorJob)


class Service:
    """The models of one bundle behind an ASGI application, `app`. Use it from one event loop."""

    def __init__(self, localizer: Localizer, backends: Sequence[Backend], options: ServerOptions) -> None:
        """Start threads, and the processes of an extractor. `backends`: the contexts, which stay the caller's to close.

        Raises ConfigError for a batch size that the engine does not take, MissingDependency, and as `Extractions`.
        """
        self._localizer, self._limits = localizer, options.limits
        spec, first = localizer.spec, backends[0]
        largest = min(backend.max_batch for backend in backends)
        size = options.batch or (largest if runs_on_gpu(first.name) else 1)
        require(1 <= size <= largest, "batch", size, f"1 to {largest}, what the engine takes")
        self._batch = size
        self._extractions = None if options.extractor is None else Extractions(options.extractor, spec)
        contexts = Contexts(backends)
        workers = options.workers or min(4, usable_cores())
        pipeline = Pipeline(spec, localizer.post, localizer.long_videos, localizer.window_overlap)
        start: Any = partial(
            Batcher,
            contexts=contexts,
            threads=workers + len(backends),
            max_wait=options.max_wait,
            queue_limit=options.limits.queue,
        )
        allocate = getattr(first, "allocate", None)
        self._videos: Batcher[VideoJob] = start(LOCALIZER, run=partial(run_videos, pipeline, size, allocate))
        self._tensors: Batcher[TensorJob] = start(NETWORK, run=partial(run_tensors, spec, size))
        self._models = {model.name: model for model in (localizer_model(spec), network_model(spec, largest))}
        self._bodies = Bodies(options.limits)
        self.connections: Callable[[], int] = lambda: 0
        """How many connections are open; for whoever accepts them to set."""
        self._metrics = Metrics(
            self._queues,
            lambda: self.app.active,
            lambda: self.connections(),
        )
        self.app = Guard(
            Router(self._routes(), redirect_slashes=False, default=_no_such_path), options.token, self._metrics
        )

    def stop_videos(self) -> None:
        """Give up videos whose features are being extracted; they are answered with 503."""
        if self._extractions is not None:
            self._extractions.stop()

    def close(self) -> None:
        """Let the threads finish what is queued, and end; extraction ends at once."""
        if self._extractions is not None:
            self._extractions.close()
        self._videos.close()
        self._tensors.close()

    def _queues(self) -> dict[str, int]:
        queues = {batcher.name: batcher.waiting for batcher in (self._videos, self._tensors)}
        return queues if self._extractions is None else {**queues, "extractor": self._extractions.waiting}

    def _routes(self) -> list[Route]:
        videos = []
        if self._extractions is not None:
            endpoint = VideoEndpoint(self._extractions, self._bodies, self._limits, _check_id, self._localize_job)
            videos.append(Route("/localize/video", endpoint, methods=["POST"]))
        model = "/v2/models/{model}"
        version = model + "/versions/{version}"
        return [
            *(Route(f"{prefix}/infer", self._infer, methods=["POST"]) for prefix in (model, version)),
            Route("/localize", self._localize, methods=["POST"]),
            *videos,
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/v2", self._server_metadata),
            *(Route(prefix, self._model_metadata) for prefix in (model, version)),
            *(Route(f"{prefix}/ready", self._model_ready) for prefix in (model, version)),
            *(Route(f"{prefix}/config", self._model_configuration) for prefix in (model, version)),
            Route("/status", self._status),
            Route("/metrics", self._get_metrics),
            Route("/", self._page),
        ]

    async def _live(self, request: Request) -> Response:
        return _json({"live": True})

    async def _ready(self, request: Request) -> Response:
        return _json({"ready": not self.app.draining}, 503 if self.app.draining else 200)

    async def _server_metadata(self, request: Request) -> Response:
        return _json({"name": "ccnet", "version": library_versions().get("ccnet", ""), "extensions": EXTENSIONS})

    async def _model_metadata(self, request: Request) -> Response:
        return _json(self._model(request).metadata())

    async def _model_configuration(self, request: Request) -> Response:
        return _json(self._model(request).configuration())

    async def _model_ready(self, request: Request) -> Response:
        model = self._model(request)
        return _json({"name": model.name, "ready": not self.app.draining}, 503 if self.app.draining else 200)

    async def _get_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _status(self, request: Request) -> Response:
        spec, described = self._localizer.spec, self._localizer.describe()
        return _json(
            {
                "engine": described.get("engine", described["engines"][0].get("backend")),
                "parity": described.get("status", "unknown"),
                "details": described["engines"][0],
                "draining": self.app.draining,
                "in_progress": self.app.active - 1,
                "queue": sum(self._queues().values()),
                "extractor": None if self._extractions is None else self._extractions.engine,
                "video_bytes": self._limits.video_bytes,
                "latency": self._metrics.latencies(),
                "labels": spec.labels,
                "layout": {"visual": spec.layout.visual, "audio": spec.layout.audio},
                "widths": {"visual": spec.visual_dim, "audio": spec.audio_dim},
            }
        )

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(_page(), headers={"content-security-policy": _POLICY, "cache-control": "no-cache"})

    async def _infer(self, request: Request) -> Response:
        """Answer `infer` of either model."""
        model = self._model(request)
        batcher: Any = self._videos if model.name == LOCALIZER else self._tensors
        _check_room(batcher)
        with self._bodies.hold() as body:
            asked = parse_infer(await body.read(request), request.headers.get(HEADER_LENGTH))
            model.check(asked)
            if model.name == LOCALIZER:
                job = VideoJob("request", localizer_source(asked))
                found = (await self._run(self._videos, job, request)).outcome()
                assert found.detections is not None
                outputs: Mapping[str, Array | Sequence[str]] = event_outputs(found.detections)
            else:
                rows = network_job(asked, self._localizer.spec, model.max_rows, self._batch)
                logits, offsets = (await self._run(self._tensors, rows, request)).outcome()
                outputs = {LOGITS: logits, OFFSETS: offsets}
        pieces, header_length = infer_response(model.name, VERSION, asked, outputs)
        if header_length is None:
            return Response(b"".join(pieces), media_type="application/json")
        headers = {HEADER_LENGTH: str(header_length)}
        return Response(b"".join(pieces), headers=headers, media_type="application/octet-stream")

    async def _localize(self, request: Request) -> Response:
        """Answer an upload of feature files with the events, as `ccnet predict` writes them."""
        _check_room(self._videos)
        video_id, duration = _check_id(request.query_params.get("id", "video")), None
        if (text := request.query_params.get("duration")) is not None:
            duration = check_seconds(_number(text))
        with self._bodies.hold() as body:
            content = await body.read(request)
            job = VideoJob(video_id, None, duration)
            job.source = partial(self._open_upload, job, content, request.headers.get("content-type", ""))
            return _json(await self._localize_job(job, request))

    async def _localize_job(self, job: VideoJob, request: Request) -> dict[str, Any]:
        """Return a video's line of an events file, with a `note` where the features do not cover the video."""
        result = (await self._run(self._videos, job, request)).outcome()
        assert result.detections is not None
        record = {"video_id": result.video_id, "duration": result.duration, "events": result.detections.to_json()}
        if result.note is not None:
            record["note"] = result.note
        return record

    def _open_upload(self, job: VideoJob, content: bytearray, content_type: str) -> Video:
        """Return the features of an upload; in a thread of the batcher, since unpacking takes time."""
        from python_multipart.multipart import parse_options_header

        kind, parameters = parse_options_header(content_type)
        if kind != b"multipart/form-data":
            return features_of_files(unpack_npz(content, self._limits.body_bytes), self._localizer.spec, job.video_id)
        form = parse_form(content, parameters.get(b"boundary", b""))
        job.video_id = _check_id(form.fields.get("id", job.video_id))
        if "duration" in form.fields:
            job.duration = check_seconds(_number(form.fields["duration"]))
        files: dict[str, Any] = {}
        for name, data in form.files.items():
            files |= unpack_npz(data, self._limits.body_bytes) if name.endswith(".npz") else {name: data}
        return features_of_files(files, self._localizer.spec, job.video_id)

    async def _run(self, batcher: Batcher[J], job: J, request: Request) -> J:
        """Queue a job and wait for its result, unless the client goes away or it takes too long."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not done.done():
                done.set_result(None)

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server was stopped by force
                loop.call_soon_threadsafe(settle)

        job.ticket.done = wake
        batcher.submit(job)
        gone = loop.create_task(wait_for_disconnect(request))
        try:
            await asyncio.wait((done, gone), timeout=self._limits.request_seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not done.done():
                batcher.cancel(job)
        if not done.done():
            if gone.done() and not gone.cancelled():
                raise Disconnected
            raise RequestError(f"no result within {self._limits.request_seconds:g} s", status=504)
        self._note(request, job.ticket.times)
        return job

    def _note(self, request: Request, times: Times) -> None:
        """Note the times of a finished inference in metrics and access log."""
        exchange = request.scope["ccnet.exchange"]
        exchange.details |= {
            "queue_ms": round((times.taken - times.submitted) * 1e3, 2),
            "engine_ms": round((times.engine_done - times.engine) * 1e3, 2),
            "batch": times.batch,
        }
        if times.batch:
            self._metrics.inference(times, time.perf_counter() - exchange.begun - exchange.extracted)

    def _model(self, request: Request) -> Model:
        name, version = request.path_params["model"], request.path_params.get("version", VERSION)
        if name not in self._models or version != VERSION:
            known = ", ".join(self._models)
            raise RequestError(
                f"no model '{quote(name, 60)}' of version '{quote(version, 60)}'; there is {known}, version {VERSION}",
                status=404,
            )
        request.scope["ccnet.exchange"].details["model"] = name
        return self._models[name]


async def _no_such_path(scope: Scope, receive: Receive, send: Send) -> None:
    raise HTTPException(404, f"no such path: {quote(scope['path'], 60)}")


def _check_room(batcher: Batcher[Any]) -> None:
    """Raise RequestError (503) before a body is read that there is no room for."""
    if batcher.full:
        raise batcher.refusal()


def _check_id(text: str) -> str:
    try:
        return check_video_id(text)
    except BadRecord as error:
        raise RequestError(str(error)) from None


def _number(text: str) -> float | str:
    try:
        return float(text) if text.isascii() and "_" not in text else text
    except ValueError:
        return text


@cache
def _page() -> str:
    return resources.files("runtime.serving").joinpath("page.html").read_text(encoding="utf-8")


def _json(data: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(data), status, media_type="application/json")
