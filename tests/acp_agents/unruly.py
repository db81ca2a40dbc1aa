"""An agent that knows the protocol and breaks it, in the way that its argument names; without the SDK."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_UPDATE = {"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": "hello"}}


def send(message: dict[str, Any]) -> None:
    """Write a message."""
    write(json.dumps({"jsonrpc": "2.0", **message}))


def write(line: str) -> None:
    """Write a line."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def update(update: object) -> None:
    """Send an update."""
    send({"method": "session/update", "params": {"sessionId": "s", "update": update}})


def prompt(way: str, number: int) -> None:
    """Answer a prompt in the way that is asked for, or not at all."""
    match way:
        case "thinks":
            update(_UPDATE | {"sessionUpdate": "agent_thought_chunk"})
            return
        case "broken":
            update(_UPDATE)
            write('{"jsonrpc": "2.0", "method": "session/upd')
            return
        case "wrong answer":
            send({"id": number, "result": {"stopReason": 5}})
            return
        case "wrong error":
            send({"id": number, "error": "no object"})
            return
        case "no object":
            for line in ("[1, 2]", "5", '"text"', "null", "{}", '{"level": "info"}', '{"id": {}}', '{"method": 7}'):
                write(line)
        case "wrong updates":
            wrongs: list[object] = [
                None,
                [],
                "x",
                {"sessionUpdate": "agent_message_chunk"},
                {"sessionUpdate": "of tomorrow"},
            ]
            for wrong in wrongs:
                update(wrong)
            send({"method": "session/update", "params": 7})
            send({"method": "session/update"})
            send({"method": "_other", "params": {}})
        case "other session":
            send({"method": "session/update", "params": {"sessionId": "other", "update": _UPDATE}})
            send({"id": 900, "method": "fs/read_text_file", "params": {"sessionId": "other", "path": "x"}})
            send({"id": 901, "method": "session/request_permission", "params": {"sessionId": "s"}})
            send({"id": 902, "method": "no/such", "params": {}})
            params: dict[str, Any] = {"sessionId": "other", "path": "x", "_meta": {"self": 1, "session_id": "s"}}
            send({"id": 903, "method": "fs/read_text_file", "params": params})
            answers = sorted(json.loads(sys.stdin.readline())["error"]["code"] for _ in range(4))
            update(_UPDATE | {"content": {"type": "text", "text": json.dumps(answers)}})
        case "many requests":
            for n in range(300):
                send({"id": f"r{n}", "method": "fs/read_text_file", "params": {"sessionId": "s", "path": str(n)}})
            answers = [json.loads(sys.stdin.readline()) for _ in range(300)]
            counted = len({answer["id"] for answer in answers if answer["error"]["code"] == -32002})
            update(_UPDATE | {"content": {"type": "text", "text": f"{counted} answers, "}})
        case "asks much":
            option = {"optionId": "yes", "name": "Yes", "kind": "allow_once"}
            for n in range(100):
                params = {"sessionId": "s", "toolCall": {"toolCallId": str(n)}, "options": [option]}
                send({"id": f"r{n}", "method": "session/request_permission", "params": params})
            time.sleep(600)
        case "chatty":
            for n in range(200):
                write(f"a line of {n} that somebody printed, \x00 and {{'a': 1}}")
                if n % 50 == 0:
                    update({"sessionUpdate": "available_commands_update", "availableCommands": []})
        case "noise":
            for _ in range(1_000):
                write("a line that somebody printed")
            return
        case "many values":
            update({"sessionUpdate": "plan", "entries": [0] * 2_000_000})
            return
        case "long line":
            write("x" * (9 << 20))
            return
        case "emoji":
            write(
                '{"jsonrpc":"2.0","method":"session/update","params":{"sessionId":"s","update":{"sessionUpdate":'
                '"agent_message_chunk","content":{"type":"text","text":"half \\ud83d"}}}}'
            )
        case "closes":
            os.close(1)
            time.sleep(600)
        case "hangs":
            return
        case "crashes with children":
            script = "import os, time; os.setsid(); print(os.getpid(), flush=True); time.sleep(600)"
            child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
            assert child.stdout is not None
            update(_UPDATE | {"content": {"type": "text", "text": child.stdout.readline().strip()}})
            os.kill(os.getpid(), signal.SIGSEGV)
    update(_UPDATE)
    send({"id": number, "result": {"stopReason": "end_turn"}})


def main() -> None:
    """Read requests and answer them."""
    way = sys.argv[1]
    if way == "exits":
        sys.stderr.write("reading the configuration\nno such model: own-secret\n\n")
        sys.exit(3)
    if way == "mute":
        time.sleep(600)
    for line in sys.stdin:
        request = json.loads(line)
        match request.get("method"):
            case "initialize":
                send({"id": request["id"], "result": {"protocolVersion": 1}})
            case "session/new":
                result = {"sessionId": 5 if way == "wrong session" else "s"}
                send({"id": request["id"], "result": result})
                if way == "deaf":
                    time.sleep(600)
            case "session/prompt":
                prompt(way, request["id"])
                if way == "asks later in a form":
                    time.sleep(0.3)  # the turn is over
                    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
                    params: dict[str, Any] = {
                        "sessionId": "s",
                        "mode": "form",
                        "message": "Who?",
                        "requestedSchema": schema,
                    }
                    send({"id": 900, "method": "elicitation/create", "params": params})
                if way == "asks later":
                    option = {"optionId": "yes", "name": "Yes", "kind": "allow_once"}
                    params = {"sessionId": "s", "toolCall": {"toolCallId": "1"}, "options": [option]}
                    send({"id": 900, "method": "session/request_permission", "params": params})
            case None:
                Path("answer").write_text(line)


if __name__ == "__main__":
    main()
