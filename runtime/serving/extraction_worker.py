"""The process that turns uploaded videos into features, beside the server.

What decodes the files of strangers may crash, take minutes, or have to stop at once, so it is apart: it can be killed.
It talks over a socket: a JSON object a message, and with each video the descriptors of its file and of one for the
features. Both files have no name, so nothing is left of them whoever dies.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import orjson

from runtime.errors import CCNetError
from runtime.video.container import ReadOptions, open_container, picture_stream, stated_seconds
from runtime.video.features import FeatureExtractor

LARGEST_MESSAGE = 1 << 16
_SAY_SECONDS = 0.3
_NICE = 10
"""Requests with features go first where both need the processor."""
_MOST_WARNINGS = 20


def main(descriptor: int) -> None:
    """Extract what the socket brings, until it ends; that ends the process, whatever it is at."""
    os.nice(_NICE)
    os.dup2(2, 1)
    link = socket.socket(fileno=descriptor)
    tasks: queue.SimpleQueue[tuple[bytes, list[int]]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(link, tasks), daemon=True).start()
    job = orjson.loads(tasks.get()[0])
    try:
        extractor = FeatureExtractor.load(job["folder"], threads=job["threads"], options=ReadOptions(**job["options"]))
    except (CCNetError, OSError) as error:
        _say(link, {"error": str(error)})
        return
    _say(link, {"engine": extractor.engines.chosen["flow"].name})
    while True:
        _, descriptors = tasks.get()
        if not descriptors:  # somebody asks whether this process is there
            _say(link, {})
            continue
        source, target = descriptors
        try:
            _say(link, _extract(extractor, source, target, lambda message: _say(link, message)))
        finally:
            os.close(source)
            os.close(target)


def _extract(
    extractor: FeatureExtractor, source: int, target: int, say: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Extract one video, and return what to say of it in the end. The features are written as they are: [n, C] each."""
    path = f"/proc/self/fd/{source}"
    try:
        with open_container(path, extractor.options) as container:
            length = stated_seconds(picture_stream(container, path), container)
        of = None if length is None else round(float(length), 2)
        told = 0.0

        def tell(frames: int) -> None:
            nonlocal told
            if time.monotonic() - told > _SAY_SECONDS:
                told = time.monotonic()
                seconds = frames / float(extractor.spec.time_base.fps)
                say({"stage": "picture", "seconds": round(seconds, 2), "of": of})

        features = extractor(path, each=tell)
    except CCNetError as error:
        return {"failed": type(error).__name__, "message": str(error).replace(path, "video")}
    try:
        with open(target, "wb", closefd=False) as stream:
            features.visual.tofile(stream)
            features.sound.tofile(stream)
    except OSError as error:
        return {"failed": "EngineError", "message": f"the features can't be kept ({error.strerror or error})"}
    warnings = [warning.replace(path, "video") for warning in features.warnings[:_MOST_WARNINGS]]
    return {"steps": len(features.rgb), "duration": features.duration, "warnings": warnings}


def _listen(link: socket.socket, tasks: queue.SimpleQueue[tuple[bytes, list[int]]]) -> None:
    with contextlib.suppress(OSError):
        while True:
            message, descriptors, _, _ = socket.recv_fds(link, LARGEST_MESSAGE, 2)
            if not message:
                break
            tasks.put((message, descriptors))
    os._exit(0)


def _say(link: socket.socket, message: dict[str, Any]) -> None:
    link.sendall(orjson.dumps(message))
