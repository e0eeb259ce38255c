"""Uploads of videos: received, extracted, localized, with progress on the way for whoever asks for it.

With `Accept: application/x-ndjson` the answer is a JSON object a line: stages as they change, and at least every few
seconds, so that nobody on the way takes the connection for dead; the last line is the result, or an `error`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from runtime.errors import RequestError
from runtime.serving.bodies import Bodies, Disconnected
from runtime.serving.extraction import Extracted, Extraction, Extractions
from runtime.serving.models import VideoJob
from runtime.serving.options import Limits
from runtime.serving.video_uploads import Upload, receive_upload

LINES = "application/x-ndjson"
_REPEAT_SECONDS = 5.0
_ROOM_SECONDS = 0.2

Say = Callable[[dict[str, Any]], Awaitable[None]]


class VideoEndpoint:
    """An ASGI application: a video in, its events out."""

    def __init__(
        self,
        extractions: Extractions,
        bodies: Bodies,
        limits: Limits,
        check_id: Callable[[str], str],
        localize: Callable[[VideoJob, Request], Awaitable[dict[str, Any]]],
    ) -> None:
        """`localize` queues features and returns what is answered; without room it raises RequestError (503)."""
        self._extractions, self._bodies, self._limits = extractions, bodies, limits
        self._check_id, self._localize = check_id, localize

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        with self._extractions.place(), self._bodies.hold() as body, contextlib.closing(Upload()) as upload:
            await receive_upload(request, body, self._limits.video_bytes, upload)
            name = upload.fields.get("id", request.query_params.get("id", upload.name))
            video_id = self._check_id(name)
            if LINES in request.headers.get("accept", ""):
                await self._answer_in_lines(upload, video_id, request, send)
                return

            async def say(progress: dict[str, Any]) -> None:
                pass

            record = await self._process(upload, video_id, request, say)
            await Response(orjson.dumps(record), media_type="application/json")(scope, receive, send)

    async def _answer_in_lines(self, upload: Upload, video_id: str, request: Request, send: Send) -> None:
        headers = [(b"content-type", LINES.encode()), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def say(record: dict[str, Any]) -> None:
            line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
            await send({"type": "http.response.body", "body": line, "more_body": True})

        try:
            record = await self._process(upload, video_id, request, say)
        except Disconnected:
            raise
        except Exception as error:  # noqa: BLE001  the status is sent; the last line says what went wrong
            status, message = request.app.note(error, request.scope["ccnet.exchange"])
            record = {"error": message, "status": status}
        await say(record)
        await send({"type": "http.response.body", "body": b""})

    async def _process(self, upload: Upload, video_id: str, request: Request, say: Say) -> dict[str, Any]:
        """Return what is answered: the video's line of an events file, with a `note` where something is to be said."""
        deadline = time.monotonic() + self._limits.video_seconds
        job = Extraction(upload.file)
        try:
            found = await self._extract(job, deadline, request, say)
        finally:
            self._extractions.cancel(job)
        exchange = request.scope["ccnet.exchange"]
        exchange.extracted = time.perf_counter() - exchange.begun
        exchange.details["extract_ms"] = round(exchange.extracted * 1e3)
        await say({"stage": "events"})
        while True:
            task = VideoJob(video_id, (*found.features, found.duration), found.duration)
            try:
                record = await self._localize(task, request)
                break
            except RequestError as error:
                # Minutes of work are not thrown away because the queue of the network is full just now.
                if error.status != 503 or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_ROOM_SECONDS)
        if found.warnings:
            record["note"] = "; ".join([*found.warnings, *([record["note"]] if "note" in record else [])])
        return record

    async def _extract(self, job: Extraction, deadline: float, request: Request, say: Say) -> Extracted:
        """Wait for the features, unless the client goes away or it takes too long."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server was stopped by force
                loop.call_soon_threadsafe(changed.set)

        job.changed = wake
        self._extractions.submit(job)
        gone = loop.create_task(wait_for_disconnect(request))
        try:
            while job.result is None:
                changed.clear()
                progress = job.progress
                if progress["stage"] == "waiting":
                    progress = {**progress, "ahead": self._extractions.ahead(job)}
                await say(progress)
                news = loop.create_task(changed.wait())
                left = max(0.0, min(_REPEAT_SECONDS, deadline - time.monotonic()))
                try:
                    await asyncio.wait((news, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    news.cancel()
                if gone.done():
                    raise Disconnected
                if job.result is None and time.monotonic() > deadline:
                    raise RequestError(f"no result within {self._limits.video_seconds:g} s", status=504)
        finally:
            gone.cancel()
        if isinstance(job.result, BaseException):
            raise job.result
        return job.result


async def wait_for_disconnect(request: Request) -> None:
    """Return when the client of a request whose body was read is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
