"""Command line of the runtime service: `python -m runtime_service serve`."""

import os

# Before grpc is imported: its newer event engine costs more CPU a call under asyncio.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

import asyncio
import gc
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import structlog
import typer
import uvloop

from runtime_service.agent_check import END_SECONDS, check_agent
from runtime_service.agents import Finding
from runtime_service.config import RuntimeConfig, SettingError
from runtime_service.errors import StoreUnavailable
from runtime_service.executor import ExecutorLimits
from runtime_service.registry import ConfigurationError, load_registry
from runtime_service.retention import RetentionLimits, delete_old_runs
from runtime_service.server import RuntimeServer
from runtime_service.session import SessionLimits
from runtime_service.store.base import Deleted
from runtime_service.store.opening import open_store
from runtime_service.validation import RequestLimits

_DATA_DIR = Path(".acp")
_CLOSE_SECONDS = 30.0
_DEFAULTS = RuntimeConfig(data_dir=_DATA_DIR, service_token="-" * 16)

app = typer.Typer(
    help="The runtime service of the ACP gateway: owns runs, executes agents, speaks gRPC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


DataDir = Annotated[Path, typer.Option(envvar="ACP_DATA_DIR", help="Folder of the run store; made when it is missing.")]
Servers = Annotated[
    Path | None, typer.Option(envvar="ACP_SERVERS", help="A servers.toml; without one the built-in servers.")
]
Store = Annotated[
    str | None,
    typer.Option(
        envvar="ACP_STORE",
        help="URL of a PostgreSQL database for the runs, shared by any number of runtime services; "
        "without one they are in a SQLite file of the data directory.",
        show_default=False,
    ),
]


@app.command()
def serve(
    listen: Annotated[
        str,
        typer.Option(envvar="ACP_RUNTIME_LISTEN", help="HOST:PORT of the gRPC service; port 0 picks one."),
    ] = "127.0.0.1:50051",
    data_dir: DataDir = _DATA_DIR,
    store: Store = None,
    advertise: Annotated[
        str | None,
        typer.Option(
            envvar="ACP_ADVERTISE",
            help="HOST:PORT by which other runtime services over the same database reach this one; "
            "without it that of --listen, or for 0.0.0.0 this machine's name.",
        ),
    ] = None,
    servers: Servers = None,
    service_token: Annotated[
        str,
        typer.Option(
            envvar="ACP_SERVICE_TOKEN",
            help="What callers must send as `authorization: Bearer …`.",
            show_default=False,
        ),
    ] = "",
    service_token_file: Annotated[
        Path | None,
        typer.Option(envvar="ACP_SERVICE_TOKEN_FILE", help="A file that holds the service token."),
    ] = None,
    max_turns: Annotated[
        int, typer.Option(envvar="ACP_MAX_TURNS", min=1, help="How many turns run at once; the rest wait.")
    ] = ExecutorLimits().max_turns,
    max_queued_turns: Annotated[
        int, typer.Option(envvar="ACP_MAX_QUEUED_TURNS", min=0, help="How many turns may wait; past it, 429.")
    ] = ExecutorLimits().max_queued,
    max_attempts: Annotated[
        int,
        typer.Option(envvar="ACP_MAX_ATTEMPTS", min=1, help="How often a turn is begun when its runtime is lost."),
    ] = ExecutorLimits().max_attempts,
    cancel_grace_seconds: Annotated[
        float,
        typer.Option(envvar="ACP_CANCEL_GRACE_SECONDS", min=0, help="Time for a cancelled agent to end by itself."),
    ] = ExecutorLimits().cancel_grace_seconds,
    lease_seconds: Annotated[
        float,
        typer.Option(
            envvar="ACP_LEASE_SECONDS",
            min=1,
            help="Turns of a service that was not heard of for so long are lost to it.",
        ),
    ] = _DEFAULTS.lease_seconds,
    lease_heartbeat_seconds: Annotated[
        float, typer.Option(envvar="ACP_LEASE_HEARTBEAT_SECONDS", min=0.1, help="How often the lease is renewed.")
    ] = ExecutorLimits().heartbeat_seconds,
    sweep_seconds: Annotated[
        float, typer.Option(envvar="ACP_SWEEP_SECONDS", min=0.1, help="How often turns that were lost are looked for.")
    ] = ExecutorLimits().sweep_seconds,
    retention_days: Annotated[
        float,
        typer.Option(envvar="ACP_RETENTION_DAYS", min=0, help="Runs unchanged for so many days are deleted; 0: never."),
    ] = RetentionLimits().run_days,
    max_session_calls: Annotated[
        int, typer.Option(envvar="ACP_MAX_SESSION_CALLS", min=1, help="How many calls a session may have open.")
    ] = SessionLimits().max_calls,
    drain_seconds: Annotated[
        float, typer.Option(envvar="ACP_DRAIN_SECONDS", min=0, help="Time for running turns after SIGTERM.")
    ] = 10.0,
    max_title_characters: Annotated[
        int, typer.Option(envvar="ACP_MAX_TITLE_CHARACTERS", min=1, help="Longest title.")
    ] = RequestLimits().title_characters,
    max_metadata_bytes: Annotated[
        int, typer.Option(envvar="ACP_MAX_METADATA_BYTES", min=2, help="Largest metadata.")
    ] = RequestLimits().metadata_bytes,
    allow_plaintext: Annotated[
        bool,
        typer.Option(envvar="ACP_ALLOW_PLAINTEXT", help="Listen unencrypted on an address that is not loopback."),
    ] = False,
    ready_file: Annotated[
        Path | None, typer.Option(help='Written once calls are answered: {"grpc_target", "pid"} as JSON.')
    ] = None,
    stop_with_stdin: Annotated[
        bool, typer.Option(help="Stop when standard input ends, as it does when the parent process dies.")
    ] = False,
    log_level: Annotated[str, typer.Option(envvar="ACP_LOG_LEVEL", help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve RunService until SIGTERM or Ctrl-C, then drain."""
    with _complaints():
        _log_as_json(log_level)
        if service_token_file is not None:
            service_token = service_token_file.read_text().strip()
        config = RuntimeConfig(
            data_dir=data_dir,
            service_token=service_token,
            listen=listen,
            servers=servers,
            allow_plaintext=allow_plaintext,
            drain_seconds=drain_seconds,
            executor=ExecutorLimits(
                max_turns, max_queued_turns, max_attempts, cancel_grace_seconds, lease_heartbeat_seconds, sweep_seconds
            ),
            requests=RequestLimits(max_title_characters, max_metadata_bytes),
            sessions=SessionLimits(max_session_calls),
            store=store or None,
            advertise=advertise,
            lease_seconds=lease_seconds,
            retention=RetentionLimits(retention_days),
        )
        uvloop.run(_serve(config, ready_file, stop_with_stdin))


@app.command()
def migrate(store: Store = None) -> None:
    """Bring the PostgreSQL database at --store to the schema of this program; services are started after it."""
    with _complaints():
        if not store:
            raise SettingError(
                "ACP_STORE must be the URL of the database; a SQLite file is brought up to date by itself"
            )
        from runtime_service.store.postgres_schema import migrate

        applied = uvloop.run(migrate(store))
        print("\n".join(f"applied {name}" for name in applied) or "the schema is up to date")


@app.command()
def delete_runs(
    older_than_days: Annotated[float, typer.Option(min=0, help="Delete runs unchanged for so many days.")],
    data_dir: DataDir = _DATA_DIR,
    store: Store = None,
) -> None:
    """Delete old runs, a few at a time; of a SQLite file, which keeps its size, only while no service has it open."""
    with _complaints():
        config = RuntimeConfig(data_dir=data_dir, service_token="-" * 16, store=store or None)
        uvloop.run(_delete_runs(config, older_than_days))


async def _delete_runs(config: RuntimeConfig, days: float) -> None:
    store = await open_store(config.store, config.store_path, address=config.listen, lease_seconds=config.lease_seconds)
    deleted = Deleted(0, 0, 0)
    try:
        async for deleted in delete_old_runs(store, days):
            if sys.stderr.isatty():
                print(f"\rdeleted {deleted.runs} runs", end="", file=sys.stderr, flush=True)
    finally:
        await store.close()
        print(f"deleted {deleted.runs} runs, with {deleted.turns} turns and {deleted.events} events")


@app.command()
def check_agents(
    server: Annotated[str | None, typer.Argument(help="Check this one alone; without, all that are declared.")] = None,
    servers: Servers = None,
    limit_seconds: Annotated[
        float, typer.Option(min=0.1, max=86_400, help="Time for each agent to end its turn.")
    ] = 60.0,
) -> None:
    """Start each declared agent, speak to it, and say what works and what is missing; exit code 1 if anything is.

    Each is asked one small turn: a model behind an account is paid for it. Nothing is stored.
    """
    with _complaints():
        if not uvloop.run(_check_agents(servers, server, limit_seconds)):
            raise typer.Exit(1)


async def _check_agents(path: Path | None, name: str | None, limit_seconds: float) -> bool:
    """Check the agents and print what comes of it; return whether all of them work."""
    registry = load_registry(path)
    bound = {resource: runtime for (_, resource), runtime in registry.bindings.items()}
    declared = [*registry.servers, *bound]
    if name is not None and name not in declared:
        raise ConfigurationError(f"there is no server {name!r} among those that are declared: {', '.join(declared)}")
    missing = []
    checked = [server for server in registry.servers.values() if name is None or server.id == bound.get(name, name)]
    try:
        for server in checked:
            typer.secho(server.id, bold=True)
            giving_up = _end_after(
                limit_seconds + 2 * END_SECONDS, "  missing  It holds up the event loop: no check can go on."
            )
            if not await check_agent(server, _print_finding, limit_seconds):
                missing.append(server.id)
            giving_up.cancel()
        for resource, runtime in bound.items():
            if name is None or name == resource:
                typer.echo(f"{resource} is bound to {runtime}.")
        if missing:
            typer.echo(f"{len(missing)} of {len(checked)} agents: something is missing: {', '.join(missing)}.")
        else:
            typer.echo("All agents work." if name is None else f"{checked[0].id} works.")
    finally:
        # One that did not end its turn hinders the end of the event loop, too; others may take their time to close.
        _end_after(END_SECONDS if missing else _CLOSE_SECONDS)
        await registry.close()
    return not missing


def _print_finding(finding: Finding) -> None:
    word, colour = ("works  ", typer.colors.GREEN) if finding.works else ("missing", typer.colors.RED)
    typer.echo(f"  {typer.style(word, fg=colour)}  {finding.text}")


def _end_after(seconds: float, words: str | None = None) -> threading.Timer:
    """End the process with exit code 1 after so long, whatever hinders it, unless it has ended or this is cancelled."""

    def end() -> None:
        if words is not None:
            typer.echo(words)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


@contextmanager
def _complaints() -> Iterator[None]:
    """End with a word about what is wrong, where that can be told."""
    try:
        yield
    except (SettingError, ConfigurationError, StoreUnavailable, OSError) as error:
        print(f"runtime_service: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


async def _serve(config: RuntimeConfig, ready_file: Path | None, stop_with_stdin: bool) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if stop_with_stdin:
        loop.add_reader(sys.stdin.fileno(), _on_stdin, loop, stop)
    async with RuntimeServer(config) as server:
        host = config.listen.rpartition(":")[0]
        target = f"{host}:{server.port}"
        # What is there by now stays; the collector need not look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        if ready_file is not None:
            temporary = ready_file.with_name(ready_file.name + ".new")
            temporary.write_text(json.dumps({"grpc_target": target, "pid": os.getpid()}))
            temporary.replace(ready_file)
        logging.getLogger(__name__).info("serving RunService at %s", target)
        await stop.wait()
        logging.getLogger(__name__).info("stopping")


def _on_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        loop.remove_reader(sys.stdin.fileno())
        stop.set()


def _log_as_json(level: str) -> None:
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=lambda event, **_: msgspec.json.encode(event).decode()),
        ],
    )
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    if level.upper() not in logging.getLevelNamesMapping():
        raise SettingError(f"ACP_LOG_LEVEL must be debug, info, warning or error, not {level!r}")
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if level.upper() == "INFO":
        # It says each request of an agent, and some agents are asked several times a second.
        logging.getLogger("httpx").setLevel(logging.WARNING)


def main() -> None:
    """Run the command line."""
    app(prog_name="acp-runtime")


if __name__ == "__main__":
    main()
