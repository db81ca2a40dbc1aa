"""An agent of the standard library alone, for many at once: says three words, the last when a file is there.

Its only argument names the file. It starts in a few hundredths of a second and needs little memory.
"""

import json
import os
import sys
import time


def main() -> None:
    """Answer requests, one after the other."""
    gate = sys.argv[1]
    for line in sys.stdin:
        request = json.loads(line)
        match request["method"]:
            case "initialize":
                capabilities = {"loadSession": False}
                answer = {"protocolVersion": 1, "agentCapabilities": capabilities, "authMethods": []}
            case "session/new":
                answer = {"sessionId": f"session of {os.getpid()}"}
            case "session/prompt":
                session = request["params"]["sessionId"]
                say(session, "one ")
                say(session, "two ")
                while not os.path.exists(gate):
                    time.sleep(0.2)
                say(session, "three")
                answer = {"stopReason": "end_turn"}
            case _:
                continue
        write({"jsonrpc": "2.0", "id": request["id"], "result": answer})


def say(session: str, text: str) -> None:
    """Say a piece of a message."""
    update = {"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": text}}
    write({"jsonrpc": "2.0", "method": "session/update", "params": {"sessionId": session, "update": update}})


def write(message: object) -> None:
    """Write a message."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
