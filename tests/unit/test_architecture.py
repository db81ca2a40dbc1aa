"""Who may know whom: the arrows of docs/architecture.md, read off the imports."""

import ast
import re
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What stands on a line may import what stands on the lines above it, and a package may import itself.
LAYERS = [
    ["runs", "errors"],
    ["agents", "store"],
    ["live_run", "agent_events", "retention", "validation"],
    ["questions"],
    ["registry"],
    ["agent_check"],
    ["event_log"],
    ["speech", "asking", "surroundings"],
    ["execution"],
    ["admission", "errands"],
    ["executor"],
    ["convert", "rpc_errors"],
    ["peers"],
    ["operations"],
    ["session"],
    ["config", "service"],
    ["server"],
    ["__main__"],
]
KNOW_GRPC = {"convert", "operations", "peers", "rpc_errors", "server", "service", "session"}
GRPC = {"grpc", "grpc_health", "grpc_reflection", "google", "protos"}
DRIVERS = {"apsw", "asyncpg", "sqlite3"}

# Modules of the gateway that could serve another HTTP library as they are.
KNOW_NO_AIOHTTP = {
    "addresses",
    "auth",
    "bodies",
    "call",
    "channel",
    "codec",
    "config",
    "errors",
    "health",
    "idempotency",
    "metrics",
    "preferences",
    "replicas",
    "run_client",
    "schema",
    "session",
}
GATEWAY_KNOW_GRPC = {"channel", "errors", "health", "replicas", "session"}
GATEWAY_KNOW_PROTOS = {"call", "channel", "codec", "handlers", "replicas", "run_client", "session", "streaming"}


def modules_of(package: str) -> dict[str, Path]:
    """The modules of a package by their dotted names, generated ones left out."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        if "_pb2" not in path.name:
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    assert found
    return found


def imports_of(path: Path) -> set[str]:
    """Everything that a module imports, anywhere in it, as dotted names; of `from a import b` both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def roots(names: Iterable[str]) -> set[str]:
    """The top-level packages of dotted names."""
    return {name.partition(".")[0] for name in names}


def rooms(names: Iterable[str], package: str) -> Iterator[str]:
    """The rooms of a package that are named: `store` for `runtime_service.store.base`."""
    for name in names:
        first, _, rest = name.partition(".")
        if first == package and rest:
            yield rest.partition(".")[0]


RUNTIME = modules_of("runtime_service")
GATEWAY = modules_of("gateway")


def room_of(module: str) -> str:
    """The room of a module of the runtime service."""
    return next(rooms([module], "runtime_service"), "")


def test_layers_name_every_room() -> None:
    """A new module has to be given its place."""
    assert {room_of(module) for module in RUNTIME} - {""} == {room for layer in LAYERS for room in layer}


def test_document_names_every_module() -> None:
    """Whoever looks for where something is done finds its file."""
    document = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for path in (RUNTIME | GATEWAY).values():
        folder = path.parent.name
        is_paragraph = folder in ("agents", "agent_client_protocol", "a2a", "store")
        lines = [line for line in document.splitlines() if is_paragraph or f" {folder}/" in line]
        assert path.name == "__init__.py" or re.search(rf"\b{path.name}\b", "\n".join(lines)), path


def test_programs_do_not_import_each_other() -> None:
    """`protos` is all that they share, and it imports neither."""
    for package, strangers in (
        ("gateway", {"runtime_service", "tests", "benchmarks"}),
        ("runtime_service", {"gateway", "tests", "benchmarks"}),
        ("protos", {"gateway", "runtime_service", "tests", "benchmarks"}),
    ):
        for module, path in modules_of(package).items():
            assert not roots(imports_of(path)) & strangers, module


@pytest.mark.parametrize("module", [module for module in RUNTIME if room_of(module)])
def test_runtime_module_imports_only_from_the_layers_above_it(module: str) -> None:
    """Arrows point one way."""
    room = room_of(module)
    above: set[str] = set()
    for layer in LAYERS:
        if room in layer:
            break
        above.update(layer)
    named = set(rooms(imports_of(RUNTIME[module]), "runtime_service"))
    # A folder's package is imported by its own modules; a single module has nobody beside it.
    own = {room} if (ROOT / "runtime_service" / room).is_dir() else set()
    assert named <= above | own


def test_domain_imports_nothing_of_the_project() -> None:
    """`runs` and `errors` stand alone."""
    for module in ("runtime_service.runs", "runtime_service.errors"):
        assert not roots(imports_of(RUNTIME[module])) & {"runtime_service", "gateway", "protos"}


@pytest.mark.parametrize("module", RUNTIME)
def test_runtime_knows_grpc_and_drivers_in_few_places(module: str) -> None:
    """gRPC in few modules, database drivers in the store alone."""
    imported = roots(imports_of(RUNTIME[module]))
    if room_of(module) not in KNOW_GRPC:
        assert not imported & GRPC
    if room_of(module) != "store":
        assert not imported & DRIVERS


def test_agents_and_stores_know_the_domain_only() -> None:
    """Either could be a package of its own."""
    for module, path in RUNTIME.items():
        room = room_of(module)
        if room in ("agents", "store"):
            assert set(rooms(imports_of(path), "runtime_service")) <= {room, "runs", "errors"}, module


def test_only_the_composition_names_a_kind_of_store() -> None:
    """Everybody else knows the promises in `store.base`."""
    for module, path in RUNTIME.items():
        if room_of(module) not in ("store", "server", "__main__"):
            stores = {name for name in imports_of(path) if name.startswith("runtime_service.store")}
            assert all(name.startswith("runtime_service.store.base") for name in stores), module


def test_only_the_registry_names_kinds_of_agents() -> None:
    """Everybody else knows the Agent protocol, and the registry names kinds by string, imported when asked for."""
    kinds = ("echo", "python", "openai", "local", "agent_client_protocol", "a2a")
    for module, path in RUNTIME.items():
        if room_of(module) != "agents":
            for name in imports_of(path):
                assert not name.startswith(tuple(f"runtime_service.agents.{kind}" for kind in kinds)), module


@pytest.mark.parametrize("module", GATEWAY)
def test_gateway_knows_http_and_grpc_in_few_places(module: str) -> None:
    """The pure modules know no aiohttp; only the channel uses stubs."""
    imported = imports_of(GATEWAY[module])
    name = module.rpartition(".")[2]
    if name in KNOW_NO_AIOHTTP:
        assert "aiohttp" not in roots(imported)
    if name not in GATEWAY_KNOW_GRPC:
        assert not roots(imported) & {"grpc", "grpc_health", "google"}
    if name not in GATEWAY_KNOW_PROTOS:
        assert "protos" not in roots(imported)
    if name != "channel":
        assert not any("_pb2_grpc" in each for each in imported)


def test_gateway_pure_modules_exist() -> None:
    """The lists above name modules that are there."""
    names = {module.rpartition(".")[2] for module in GATEWAY}
    assert names >= KNOW_NO_AIOHTTP | GATEWAY_KNOW_GRPC | GATEWAY_KNOW_PROTOS


@pytest.mark.parametrize("package", ["gateway", "runtime_service"])
def test_imports_make_no_circle(package: str) -> None:
    """A circle would raise CycleError, which names it."""
    modules = modules_of(package)
    graph = {module: {n for n in imports_of(path) if n in modules and n != module} for module, path in modules.items()}
    # A package's own __init__ gathers its modules, which import it by its dotted name only.
    TopologicalSorter(graph).prepare()
