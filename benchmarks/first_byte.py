"""First byte: an SSE start through the product beside the first message of a bare gRPC call, in turns.

python -m benchmarks.first_byte < job.json > result.json
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import grpc

from benchmarks.environment import EVENTS, TEXT, process_environment, run_loop
from benchmarks.processes import Server
from benchmarks.product import echo, start_request
from benchmarks.sse import Follower
from protos.acp.runs.v1 import run_service_pb2, run_service_pb2_grpc

_WARM_UP = 50


@dataclass(frozen=True, slots=True)
class FirstByte:
    """Medians in milliseconds."""

    grpc_ms: float
    sse_ms: float


def measure_first_byte(floor: Server, product: Server, samples: int) -> FirstByte:
    """Both medians, from a client process of its own."""
    job = {"floor": asdict(floor), "product": asdict(product), "samples": samples}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.first_byte"],
        input=json.dumps(job).encode(),
        capture_output=True,
        env=process_environment(),
    )
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace").strip()[-2000:])
    return FirstByte(**json.loads(done.stdout))


def _sse_seconds(server: Server, request: str) -> float:
    return Follower(server, request).read_to_end().first


async def _main() -> None:
    job = json.load(sys.stdin)
    floor, product = Server(**job["floor"]), Server(**job["product"])
    request = start_request(product, echo(EVENTS), TEXT, accept="text/event-stream")
    message = run_service_pb2.StartRunRequest(input=TEXT)
    grpc_seconds: list[float] = []
    sse_seconds: list[float] = []
    async with grpc.aio.insecure_channel(floor.grpc_target) as channel:
        stub = run_service_pb2_grpc.RunServiceStub(channel)
        for _ in range(_WARM_UP + job["samples"]):
            began = time.perf_counter()
            answers = aiter(stub.StartRun(message))
            await anext(answers)
            grpc_seconds.append(time.perf_counter() - began)
            async for _ in answers:  # to the end: a call that is left early would have to be cancelled
                pass
            sse_seconds.append(await asyncio.to_thread(_sse_seconds, product, request))
    medians = (1000 * statistics.median(each[_WARM_UP:]) for each in (grpc_seconds, sse_seconds))
    json.dump(asdict(FirstByte(*medians)), sys.stdout)


if __name__ == "__main__":
    run_loop(_main())
