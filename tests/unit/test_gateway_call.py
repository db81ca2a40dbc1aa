"""Calls of the gateway that go on over another stream."""

import asyncio

from gateway.call import Call
from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from tests.support import run_async


class Nowhere:
    """A place that carries nothing."""

    def acknowledge(self, call: Call, updates: int) -> None:
        """Take note of nothing."""

    def forget(self, call: Call) -> None:
        """Know nothing."""


def update(thread: "pb.ThreadStatus.ValueType") -> rpc.SessionUpdate:
    """A running run whose thread has a status."""
    news = rpc.RunUpdate(run=pb.Run(turn=1, status=pb.RUN_STATUS_RUNNING), thread=pb.Thread(status=thread))
    return rpc.SessionUpdate(call=1, run_update=news)


def test_follower_is_told_of_a_question_that_was_asked_while_the_stream_was_broken() -> None:
    """Not once more of what it knew."""

    async def main() -> None:
        command = rpc.SessionCommand(watch_run=rpc.WatchRunRequest(run_id="run_1"))
        call = Call(asyncio.get_running_loop(), Nowhere(), command, None)
        shown = []
        for number, thread in enumerate(
            (pb.THREAD_STATUS_RUNNING, pb.THREAD_STATUS_RUNNING, pb.THREAD_STATUS_PERMISSION_ASKED), 1
        ):
            call.begin(number, 1)
            call.deliver(update(thread))
            told = await call.next()
            assert told is not None
            shown.append(told.run_update.HasField("run"))
        assert shown == [True, False, True]

    run_async(main())
