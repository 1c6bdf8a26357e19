"""How a host serves: one frozen group, read once by the command and passed down."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Limits and habits of the front and its engine children."""

    body_limit: int = 64 * 2**20
    """Bytes that a request body may have, also after decompression."""
    deadline: float = 30.0
    """Seconds from a request's arrival to its answer; then 504."""
    queue: int = 512
    """Requests that may wait for one version's child; then 503."""
    hang: float = 60.0
    """Seconds without any answer from a child that has work, after which it is killed and brought up again."""
    load_timeout: float = 600.0
    """Seconds that loading, warm-up and golden check of one version may take together."""
    drain: float = 60.0
    """Seconds that requests in flight get before a retired child is ended."""
    keep_previous: bool = True
    """Keep the child of the previous version resident, so that rolling back is instant."""
    warm_up: int = 10
    """Times the golden inputs run before a version may answer."""
    threads: int = 1
    """Threads that one operator of a child may use."""
    device: str = "cpu"
    """Where children compute: cpu, cuda, cuda:1 …"""
    factories: frozenset[str] = frozenset()
    """`module:factory` programs that the operator of this host allows."""
    engine: str = "weighbridge.engines.load:load"
    """`module:function` that loads an artifact in a child."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that children get besides the few that they inherit by name."""
