"""What all sides of a comparison share: the text of a run, the environment of gRPC, the event loop.

The floor is only a fair one while it runs under the same switches as the product, so they live here once.
"""

import json
import os
from collections.abc import Coroutine
from typing import Any, Final

EVENTS: Final = 10
TEXT: Final = "the quick brown fox jumps over the lazy dog, ten words in it"
assert len(TEXT) == 60
WORD: Final = TEXT.replace(" ", "-")  # one word, so one delta a message
BODY: Final = json.dumps({"content": TEXT})
SETTLE_SECONDS: Final = 2.0  # before memory is read

# grpcio's iomgr poller instead of its EventEngine: README.md has what it gives. Empty: grpcio's own choice.
GRPC_EXPERIMENTS: Final = "-event_engine_client,-event_engine_listener"


def process_environment() -> dict[str, str]:
    """The environment of every server process that is measured; gRPC reads it when it is first imported."""
    return os.environ | {"GRPC_EXPERIMENTS": GRPC_EXPERIMENTS, "PYTHONUNBUFFERED": "1"}


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run `main` on the loop that the product uses, uvloop where there is one."""
    try:
        import uvloop
    except ImportError:  # Windows
        import asyncio

        asyncio.run(main)
    else:
        uvloop.run(main)
