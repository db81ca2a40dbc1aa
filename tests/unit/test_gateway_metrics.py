"""What GET /metrics tells."""

from gateway.metrics import Metrics


def test_metrics_are_counted_by_label() -> None:
    """Requests, latency and runs are counted where they belong; the open streams are asked for when they are shown."""
    streams = [1.0]
    metrics = Metrics(lambda: streams[0])
    for seconds in (0.0001, 0.2):
        metrics.request_ended("GET", "/x", 200, seconds)
    metrics.request_ended("GET", "/x", 404, 100)
    metrics.run_answered("start", "completed")
    streams[0] = 3
    lines = metrics.text().decode().splitlines()
    assert 'acp_gateway_requests_total{method="GET",route="/x",status="200"} 2.0' in lines
    assert 'acp_gateway_requests_total{method="GET",route="/x",status="404"} 1.0' in lines
    assert 'acp_gateway_request_duration_seconds_bucket{le="0.25",method="GET",route="/x"} 2.0' in lines
    assert 'acp_gateway_request_duration_seconds_bucket{le="+Inf",method="GET",route="/x"} 3.0' in lines
    assert 'acp_gateway_runs_total{operation="start",status="completed"} 1.0' in lines
    assert "acp_gateway_open_streams 3.0" in lines


def test_metrics_of_two_gateways_are_apart() -> None:
    """Nothing is registered for the whole process."""
    one, other = Metrics(lambda: 0), Metrics(lambda: 0)
    one.run_answered("start", "failed")
    assert b'status="failed"' not in other.text()
