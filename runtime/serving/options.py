"""What a server is told: where it listens, who may ask, and how much it takes on."""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.errors import ConfigError
from runtime.schema import require
from runtime.video.container import ReadOptions

MIB = 1 << 20
_SHORTEST_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a server takes on. Beyond it refuses, and does not grow."""

    queue: int = 128
    """Requests that wait for a batch, for each model; then 503."""
    body_bytes: int = 64 * MIB
    """Largest body, and largest content of an archive; then 413."""
    memory_bytes: int = 1024 * MIB
    """Bytes of all bodies that are held at one time; then 503."""
    connections: int = 512
    """Open connections; then the one that has been without a request for longest is closed."""
    request_seconds: float = 60.0
    """From the end of the body to the answer; then 504."""
    body_seconds: float = 60.0
    """For the whole body; a longer one than `body_bytes`, a video's, in proportion; then 408."""
    pause_seconds: float = 10.0
    """For the headers of a request, between two pieces of a body, and for a client that does not read its answer."""
    idle_seconds: float = 60.0
    """A connection without a request; then it is closed."""
    video_bytes: int = 1024 * MIB
    """Largest video file."""
    video_seconds: float = 3600.0
    """From the end of a video's upload to the answer; then 504."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value > 0, f"limits.{name}", value, "a number above 0")


@dataclass(frozen=True, kw_only=True)
class ExtractorOptions:
    """What makes features of the videos that a server takes."""

    folder: str
    threads: int | None = None
    """CPU threads of each process's engines."""
    processes: int = 1
    """Videos that are extracted at a time."""
    queue: int = 4
    """Videos beside those that are uploaded or wait; then 503."""
    read: ReadOptions = field(default_factory=ReadOptions)

    def __post_init__(self) -> None:
        require(self.processes >= 1, "processes", self.processes, "1 or more")
        require(self.queue >= 0, "queue", self.queue, "0 or more")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where a server listens, who may ask, and how it batches."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    token: str | None = None
    """What clients have to send as `Authorization: Bearer TOKEN`; None: nobody is asked."""
    tls_certificate: str | None = None
    """PEM file of the certificate chain."""
    tls_key: str | None = None
    batch: int | None = None
    """Most videos that are put into one engine call; None: what the engine takes on a GPU, 1 on a CPU."""
    max_wait: float = 0.0
    """Seconds that a request waits for others while an execution context is free."""
    workers: int | None = None
    """Threads that prepare and post-process, beside those that wait for an engine."""
    extractor: ExtractorOptions | None = None
    """None: no videos are taken, only features."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        require(0 <= self.port < 1 << 16, "port", self.port, "0 to 65535")
        require(0 <= self.max_wait <= 10, "max_wait", self.max_wait, "seconds, 0 to 10")
        both = (self.tls_certificate is None) == (self.tls_key is None)
        require(both, "tls", (self.tls_certificate, self.tls_key), "a certificate and its key, or neither")
        token = self.token
        if token is not None and not (token.isascii() and token.isprintable() and len(token) >= _SHORTEST_TOKEN):
            expected = f"{_SHORTEST_TOKEN} or more printable ASCII ones"
            raise ConfigError(f"token: got {len(token)} characters, expected {expected}")  # without showing them

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        import ipaddress

        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
