"""Command line of the gateway: `acp-gateway up | serve | keys | agents`."""

import os

# Before grpc is imported: its newer event engine costs more CPU a call under asyncio.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

import asyncio
import gc
import json
import secrets
import signal
import tomllib
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
import typer
import uvloop

from gateway.app import Gateway
from gateway.auth import KeyFile
from gateway.config import GatewayConfig
from gateway.key_commands import DATA_DIR, Complaints, DataDir, KeysFile, key_file, keys_app
from gateway.logs import configure_logs
from gateway.supervisor import RuntimeProcess, runtime_command

app = typer.Typer(
    help="The ACP gateway: the ACP REST API in front of agents behind a gRPC RunService.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(keys_app, name="keys")
agents_app = typer.Typer(help="The agents of this machine: check them.", no_args_is_help=True)
app.add_typer(agents_app, name="agents")


@agents_app.callback()
def _agents() -> None:
    """Keep `check` a command of its own while it is the only one."""


# Before `serve` there may be who balances, and who has to hear first. Before `up` there is nobody.
_SERVE_DRAIN_DELAY_SECONDS = 5.0
_DEFAULTS = GatewayConfig(grpc_target="127.0.0.1:0", service_token="-", api_key="-")

Host = Annotated[str, typer.Option(envvar="ACP_HOST", help="Address to serve REST at.")]
Port = Annotated[int, typer.Option(envvar="ACP_PORT", help="Port to serve REST at; 0 picks one.")]
Servers = Annotated[
    Path | None, typer.Option(envvar="ACP_SERVERS", help="A servers.toml; without one the built-in servers.")
]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="ACP_API_KEY", help="A key that is accepted beside those of the key file.", show_default=False),
]
ReadyFile = Annotated[
    Path | None,
    typer.Option(help="Written as JSON once requests are answered, for scripts: url, api_key, grpc_target, pids."),
]
Plaintext = Annotated[
    bool,
    typer.Option(envvar="ACP_ALLOW_PLAINTEXT", help="Serve unencrypted on an address that is not loopback."),
]
WaitLimit = Annotated[
    float,
    typer.Option(envvar="ACP_WAIT_LIMIT_SECONDS", help="Longest wait for the end of a turn; past it, 202."),
]
MaxBody = Annotated[int, typer.Option(envvar="ACP_MAX_BODY_BYTES", help="Largest request body; past it, 413.")]
MaxDepth = Annotated[int, typer.Option(envvar="ACP_MAX_JSON_DEPTH", help="Deepest JSON in a request body.")]
MaxTitle = Annotated[int, typer.Option(envvar="ACP_MAX_TITLE_CHARACTERS", help="Longest title of a run.")]
MaxMetadata = Annotated[int, typer.Option(envvar="ACP_MAX_METADATA_BYTES", help="Largest metadata.")]
BodySeconds = Annotated[
    float, typer.Option(envvar="ACP_BODY_SECONDS", help="Time for a request body to arrive; past it, 408.")
]
IdleSeconds = Annotated[
    float, typer.Option(envvar="ACP_IDLE_SECONDS", help="How long a connection may lie idle between requests.")
]
WriteSeconds = Annotated[
    float, typer.Option(envvar="ACP_WRITE_SECONDS", help="Time for a client to read what it is sent, then it is cut.")
]
MaxConnections = Annotated[
    int, typer.Option(envvar="ACP_MAX_CONNECTIONS", help="Most connections at once; past it, 503.")
]
MaxCalls = Annotated[
    int, typer.Option(envvar="ACP_MAX_CALLS", help="Most requests under way at the runtime service; past it, 503.")
]
Reconnect = Annotated[
    float,
    typer.Option(envvar="ACP_RECONNECT_SECONDS", help="Time for a runtime service to come back; then 503."),
]
Heartbeat = Annotated[
    float,
    typer.Option(envvar="ACP_HEARTBEAT_SECONDS", help="An idle stream says that it is alive this often."),
]
Drain = Annotated[
    float,
    typer.Option(envvar="ACP_DRAIN_SECONDS", help="Time for requests and turns under way after SIGTERM."),
]
DrainDelay = Annotated[
    float,
    typer.Option(
        envvar="ACP_DRAIN_DELAY_SECONDS",
        help="After SIGTERM /health says 503 so long before connections are refused; answers then end theirs.",
    ),
]
LogLevel = Annotated[str, typer.Option(envvar="ACP_LOG_LEVEL", help="debug, info, warning or error.")]


@app.command()
def up(
    context: typer.Context,
    host: Host = _DEFAULTS.host,
    port: Port = _DEFAULTS.port,
    data_dir: DataDir = DATA_DIR,
    servers: Servers = None,
    api_key: ApiKey = None,
    ready_file: ReadyFile = None,
    allow_plaintext: Plaintext = False,
    wait_limit_seconds: WaitLimit = _DEFAULTS.wait_limit_seconds,
    max_body_bytes: MaxBody = _DEFAULTS.max_body_bytes,
    max_json_depth: MaxDepth = _DEFAULTS.max_json_depth,
    max_title_characters: MaxTitle = _DEFAULTS.max_title_characters,
    max_metadata_bytes: MaxMetadata = _DEFAULTS.max_metadata_bytes,
    max_connections: MaxConnections = _DEFAULTS.max_connections,
    max_calls: MaxCalls = _DEFAULTS.max_calls,
    reconnect_seconds: Reconnect = _DEFAULTS.reconnect_seconds,
    heartbeat_seconds: Heartbeat = _DEFAULTS.heartbeat_seconds,
    body_seconds: BodySeconds = _DEFAULTS.body_seconds,
    idle_seconds: IdleSeconds = _DEFAULTS.idle_seconds,
    write_seconds: WriteSeconds = _DEFAULTS.write_seconds,
    drain_delay_seconds: DrainDelay = _DEFAULTS.drain_delay_seconds,
    drain_seconds: Drain = _DEFAULTS.drain_seconds,
    log_level: LogLevel = "info",
) -> None:
    """Start everything on this machine: the gateway, and the runtime service as a process of its own."""
    with Complaints():
        configure_logs(log_level)
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = api_key or _kept_key(data_dir)
        token = _kept_secret(data_dir / "service-token", lambda: secrets.token_hex(32))
        config = _config(context, grpc_target="127.0.0.1:0", service_token=token, keys_file=data_dir / "keys.json")
        uvloop.run(_up(config, data_dir, servers, key, ready_file, log_level))


@app.command()
def serve(
    context: typer.Context,
    grpc_target: Annotated[
        str,
        typer.Option(
            envvar="ACP_GRPC_TARGET", help="HOST:PORT of each runtime service, commas between; names are followed."
        ),
    ] = "127.0.0.1:50051",
    service_token: Annotated[
        str, typer.Option(envvar="ACP_SERVICE_TOKEN", help="The runtime service's token.", show_default=False)
    ] = "",
    service_token_file: Annotated[
        Path | None,
        typer.Option(envvar="ACP_SERVICE_TOKEN_FILE", help="A file that holds the service token."),
    ] = None,
    keys_file: KeysFile = None,
    data_dir: DataDir = DATA_DIR,
    host: Host = _DEFAULTS.host,
    port: Port = _DEFAULTS.port,
    api_key: ApiKey = None,
    ready_file: ReadyFile = None,
    allow_plaintext: Plaintext = False,
    wait_limit_seconds: WaitLimit = _DEFAULTS.wait_limit_seconds,
    max_body_bytes: MaxBody = _DEFAULTS.max_body_bytes,
    max_json_depth: MaxDepth = _DEFAULTS.max_json_depth,
    max_title_characters: MaxTitle = _DEFAULTS.max_title_characters,
    max_metadata_bytes: MaxMetadata = _DEFAULTS.max_metadata_bytes,
    max_connections: MaxConnections = _DEFAULTS.max_connections,
    max_calls: MaxCalls = _DEFAULTS.max_calls,
    reconnect_seconds: Reconnect = _DEFAULTS.reconnect_seconds,
    heartbeat_seconds: Heartbeat = _DEFAULTS.heartbeat_seconds,
    body_seconds: BodySeconds = _DEFAULTS.body_seconds,
    idle_seconds: IdleSeconds = _DEFAULTS.idle_seconds,
    write_seconds: WriteSeconds = _DEFAULTS.write_seconds,
    drain_delay_seconds: DrainDelay = _SERVE_DRAIN_DELAY_SECONDS,
    drain_seconds: Drain = _DEFAULTS.drain_seconds,
    log_level: LogLevel = "info",
) -> None:
    """Serve REST only, in front of a runtime service that runs elsewhere."""
    with Complaints():
        configure_logs(log_level)
        if service_token_file is not None:
            service_token = service_token_file.read_text().strip()
        config = _config(context, service_token=service_token, keys_file=key_file(keys_file, data_dir).path)
        uvloop.run(_serve(config, ready_file))


@agents_app.command("check")
def agents_check(
    server: Annotated[str | None, typer.Argument(help="Check this one alone; without, all that are declared.")] = None,
    servers: Servers = None,
    limit_seconds: Annotated[
        float, typer.Option(min=0.1, max=86_400, help="Time for each agent to end its turn.")
    ] = 60.0,
) -> None:
    """Start each declared agent, speak to it, and say what works and what is missing; exit code 1 if anything is.

    Each is asked one small turn: a model behind an account is paid for it. Nothing is stored.
    """
    arguments = ["check-agents", "--limit-seconds", str(limit_seconds)]
    if servers is not None:
        arguments += ["--servers", str(servers)]
    command = runtime_command(*arguments, *(["--", server] if server is not None else []))
    # In the place of this process: it is the one at the terminal, and its exit code is the answer.
    os.execv(command[0], command)  # noqa: S606 - the same interpreter; no shell is wanted


def _config(context: typer.Context, **more: Any) -> GatewayConfig:
    """Build the config from the options of the command and `more`; they are named alike. Raises SettingError.

    Paths must be among `more`: the context holds them as text.
    """
    options = {name: value for name, value in context.params.items() if name in GatewayConfig.__struct_fields__}
    return GatewayConfig(**options | more)


async def _up(
    config: GatewayConfig,
    data_dir: Path,
    servers: Path | None,
    key: str,
    ready_file: Path | None,
    log_level: str,
) -> None:
    stop = _stop_event()
    async with AsyncExitStack() as stack:
        # What both programs must agree on, however it was set here.
        environment = {
            "ACP_SERVICE_TOKEN": config.service_token,
            "ACP_MAX_TITLE_CHARACTERS": str(config.max_title_characters),
            "ACP_MAX_METADATA_BYTES": str(config.max_metadata_bytes),
            "ACP_LOG_LEVEL": log_level,
        }
        runtime_process = RuntimeProcess(data_dir, servers, config.drain_seconds, environment)
        starting = asyncio.ensure_future(stack.enter_async_context(runtime_process))
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            starting.cancel()
            await asyncio.wait([starting])
            return
        runtime = starting.result()

        gateway = await stack.enter_async_context(Gateway(msgspec.structs.replace(config, grpc_target=runtime.target)))
        print(_banner(gateway.url, key, _first_server(servers)), flush=True)
        _write_ready(
            ready_file,
            url=gateway.url,
            api_key=key,
            grpc_target=runtime.target,
            gateway_pid=os.getpid(),
            runtime_pid=runtime.pid,
        )
        _settle_memory()
        await stop.wait()


async def _serve(config: GatewayConfig, ready_file: Path | None) -> None:
    stop = _stop_event()
    async with Gateway(config) as gateway:
        print(
            f"The ACP gateway serves {gateway.url} for the runtime service at {config.grpc_target}",
            flush=True,
        )
        _write_ready(
            ready_file,
            url=gateway.url,
            api_key=config.api_key,
            grpc_target=config.grpc_target,
            gateway_pid=os.getpid(),
        )
        _settle_memory()
        await stop.wait()


def _stop_event() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _settle_memory() -> None:
    """What is there by now stays; the collector need not look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _write_ready(path: Path | None, **values: object) -> None:
    if path is not None:
        temporary = path.with_name(path.name + ".new")
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(values))
        temporary.replace(path)


def _kept_key(data_dir: Path) -> str:
    """Return the key that was made for this data directory at its first start."""
    keys_file = KeyFile(data_dir / "keys.json")
    return _kept_secret(data_dir / "api-key", lambda: keys_file.create("acp-gateway up")[0])


def _kept_secret(path: Path, make: Callable[[], str]) -> str:
    if not path.exists():
        # In one piece, or a crash in between would leave an empty secret for all later starts.
        temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(make())
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    return path.read_text().strip()


def _first_server(servers: Path | None) -> str:
    """Return a server that the key may start runs on, for the curl line."""
    if servers is None:
        return "assistant"
    # The runtime service has read the file by now, and found it good.
    for name, table in tomllib.loads(servers.read_text("utf-8"))["servers"].items():
        if table["kind"] == "agent_runtime" and table.get("organization", "default") == "default":
            return quote(name, safe="")
    return "SERVER"


def _banner(url: str, key: str, server: str) -> str:
    return f"""
The ACP gateway is up.

  Base URL  {url}
  API key   {key}

Try it:

  curl -s {url}/v1/servers/{server}/runs \\
    -H 'Authorization: Bearer {key}' \\
    -H 'Content-Type: application/json' \\
    -d '{{"content": "Say hello in one sentence."}}'

Ctrl-C ends it.
"""


def main() -> None:
    """Run the command line."""
    app(prog_name="acp-gateway")


if __name__ == "__main__":
    main()
