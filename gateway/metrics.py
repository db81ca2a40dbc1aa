"""What `GET /metrics` tells, in Prometheus' text format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one gateway. Labels are bounded: routes, methods and statuses of the URL table."""

    def __init__(self, open_streams: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "acp_gateway_requests",
            "Requests by route and HTTP status.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "acp_gateway_request_duration_seconds",
            "Time from the request's head to the end of its answer; a stream's is its whole life.",
            ("method", "route"),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._runs = Counter(
            "acp_gateway_runs",
            "Answered starts, continues and cancels by the run's status in the answer.",
            ("operation", "status"),
            registry=self._registry,
        )
        Gauge("acp_gateway_open_streams", "Live streams that are open now.", registry=self._registry).set_function(
            open_streams
        )
        # The children by their labels: `labels()` itself costs more than the counting.
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._run_children: dict[tuple[str, str], Counter] = {}

    def request_ended(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        children = self._children.get((method, route, status))
        if children is None:
            children = self._requests.labels(method, route, str(status)), self._seconds.labels(method, route)
            self._children[method, route, status] = children
        children[0].inc()
        children[1].observe(seconds)

    def run_answered(self, operation: str, status: str) -> None:
        """Count a run that was answered."""
        child = self._run_children.get((operation, status))
        if child is None:
            child = self._run_children[operation, status] = self._runs.labels(operation, status)
        child.inc()

    def text(self) -> bytes:
        """Return everything as text."""
        return generate_latest(self._registry)
