"""First byte: an SSE start through the product beside the first message of a bare gRPC call, in turns.

python -m benchmarks.first_byte < job.json > result.json
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import grpc

from benchmarks.effort import Effort
from benchmarks.environment import EVENTS, TEXT, process_environment, run_loop
from benchmarks.floor import floor
from benchmarks.processes import Server
from benchmarks.product import echo, product, start_request
from benchmarks.report import Section, Target, table
from benchmarks.sse import Follower
from protos.acp.runs.v1 import run_service_pb2, run_service_pb2_grpc

_WARM_UP = 50


def measure_first_byte(directory: Path, effort: Effort) -> Section:
    """Both medians, from a client process of its own."""
    with floor(directory) as bare, product(directory) as whole:
        job = {"floor": asdict(bare), "product": asdict(whole), "samples": effort.first_bytes}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.first_byte"],
            input=json.dumps(job).encode(),
            capture_output=True,
            env=process_environment(),
        )
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace").strip()[-2000:])
    grpc_ms, sse_ms = json.loads(done.stdout)
    over = sse_ms - grpc_ms
    rows = [
        ("bare gRPC call, first message", f"{grpc_ms:.2f}"),
        ("SSE start, first byte of the body", f"{sse_ms:.2f}"),
        ("difference", f"{over:.2f}"),
    ]
    return Section(
        "First byte",
        table(("median", "ms"), rows),
        [Target("First byte of an SSE start", "≤ 2 ms over a bare call", f"{over:.2f} ms", over <= 2)],
    )


def _sse_seconds(server: Server, request: str) -> float:
    return Follower(server, request).read_to_end().first


async def _main() -> None:
    job = json.load(sys.stdin)
    bare, whole = Server(**job["floor"]), Server(**job["product"])
    request = start_request(whole, echo(EVENTS), TEXT, accept="text/event-stream")
    message = run_service_pb2.StartRunRequest(input=TEXT)
    grpc_seconds: list[float] = []
    sse_seconds: list[float] = []
    async with grpc.aio.insecure_channel(bare.grpc_target) as channel:
        stub = run_service_pb2_grpc.RunServiceStub(channel)
        for _ in range(_WARM_UP + job["samples"]):
            began = time.perf_counter()
            answers = aiter(stub.StartRun(message))
            await anext(answers)
            grpc_seconds.append(time.perf_counter() - began)
            async for _ in answers:  # to the end: a call that is left early would have to be cancelled
                pass
            sse_seconds.append(await asyncio.to_thread(_sse_seconds, whole, request))
    json.dump([1000 * statistics.median(each[_WARM_UP:]) for each in (grpc_seconds, sse_seconds)], sys.stdout)


if __name__ == "__main__":
    run_loop(_main())
