"""Starting the product, and what it takes while nobody calls: seconds to the first healthy answer, memory, CPU."""

import http.client
import socket
import statistics
import time
from pathlib import Path
from typing import Final

from benchmarks.effort import Effort
from benchmarks.environment import SETTLE_SECONDS
from benchmarks.processes import cpu_seconds, memory_kib
from benchmarks.product import starting_product
from benchmarks.report import Section, Target, table

_POLL_SECONDS: Final = 0.005
_LONGEST_START_SECONDS: Final = 60.0


def measure_start(directory: Path, effort: Effort) -> Section:
    """Warm starts over one store; the first one warms up, and the last one is then left alone."""
    starts = []
    for n in range(effort.starts + 1):
        port = _free_port()
        began = time.perf_counter()
        with starting_product(directory, port=port) as ready:
            starts.append(_seconds_to_health(port, began))
            server = ready()
            if n == effort.starts:
                time.sleep(SETTLE_SECONDS)
                rss, pss = (memory_kib(server.pids, figure) / 1024 for figure in ("Rss", "Pss"))
                before = cpu_seconds(server.pids)
                time.sleep(effort.idle_seconds)
                idle = (cpu_seconds(server.pids) - before) / effort.idle_seconds
    start = statistics.median(starts[1:])
    rows = [
        (f"start to the first 200 of /health, median of {effort.starts}", f"{start:.2f} s"),
        ("the longest of these", f"{max(starts[1:]):.2f} s"),
        (f"CPU of both processes, idle for {effort.idle_seconds:.0f} s", f"{idle:.2%} of a core"),
        ("resident memory of both, RSS", f"{rss:.0f} MiB"),
        ("the same, shared pages once, PSS", f"{pss:.0f} MiB"),
    ]
    return Section(
        "Start and rest, without a model",
        table(("what", "measured"), rows),
        [
            Target("Start to health", "≤ 2 s", f"{start:.2f} s", start <= 2),
            Target("Idle CPU, both processes", "< 0.5 % of a core", f"{idle:.2%}", idle < 0.005),
            Target("Resident memory (RSS), both processes", "≤ 160 MiB", f"{rss:.0f} MiB", rss <= 160),
        ],
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _seconds_to_health(port: int, began: float) -> float:
    while (seconds := time.perf_counter() - began) < _LONGEST_START_SECONDS:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return time.perf_counter() - began
        except ConnectionError:
            pass
        finally:
            connection.close()
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"not healthy after {seconds:.0f} s")
