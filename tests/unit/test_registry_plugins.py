"""Kinds of agents from other packages: found by entry point, loaded when named, and told what is wrong with them."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime_service.registry import PLUGINS, ConfigurationError, Registry, load_registry
from tests.support import run_async

AGENT = """
import msgspec
from runtime_service.agents import Agent, Message


class Options(msgspec.Struct, forbid_unknown_fields=True):
    tone: str = "kind"


class Parrot(Agent):
    Options = Options

    def __init__(self, options):
        self.tone = options.tone

    async def run(self, turn):
        yield Message(turn.input)


class Silent(Agent):
    Options = Options


class Bare(Agent):
    async def run(self, turn):
        yield Message(turn.input)


class Fragile(Parrot):
    def __init__(self, options):
        raise KeyError("seed")


class Empty(Parrot):
    def __init__(self):
        pass


class Stranger:
    Options = Options
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that installs a package with these entry points and modules."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    made: list[str] = []

    def make(name: str, kinds: dict[str, str], modules: dict[str, str]) -> None:
        information = site / f"{name}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        entries = [f"{kind} = {value}" for kind, value in kinds.items()]
        (information / "entry_points.txt").write_text("\n".join([f"[{PLUGINS}]", *entries]))
        for module, text in modules.items():
            (site / f"{module}.py").write_text(text)
            made.append(module)

    yield make
    for module in made:
        sys.modules.pop(module, None)


def load(folder: Path, agent: str, options: str = "{}") -> Registry:
    """Read a file with one server of this kind."""
    path = folder / "servers.toml"
    path.write_text(f'[servers.mine]\nkind = "agent_runtime"\nagent = "{agent}"\noptions = {options}\n')
    return load_registry(path)


def test_kind_of_another_package_takes_its_options(tmp_path: Path, install: Install) -> None:
    """It is made as a built-in one is; what its Options do not know is refused."""
    install("parrots", {"parrot": "parrots_a:Parrot"}, {"parrots_a": AGENT})
    registry = load(tmp_path, "parrot", '{ tone = "rude" }')
    assert vars(registry.servers["mine"].agent) == {"tone": "rude"}
    run_async(registry.close())
    with pytest.raises(ConfigurationError, match=r"servers\.mine: options: .*`tune`"):
        load(tmp_path, "parrot", '{ tune = "x" }')


def test_only_the_kind_that_is_named_is_imported(tmp_path: Path, install: Install) -> None:
    """What else is installed, broken or not, concerns nobody."""
    modules = {"parrots_b": AGENT, "broken_b": "raise RuntimeError('imported')"}
    install("parrots", {"parrot": "parrots_b:Parrot", "broken": "broken_b:Agent", "echo2": "parrots_b:Gone"}, modules)
    assert "mine" in load(tmp_path, "parrot").servers
    assert "mine" in load(tmp_path, "echo").servers
    assert "broken_b" not in sys.modules


@pytest.mark.parametrize("entries", [f"[{PLUGINS}]\nno value".encode(), b"\xff\xfe["])
def test_package_with_broken_metadata_is_left_out(
    tmp_path: Path, install: Install, caplog: pytest.LogCaptureFixture, entries: bytes
) -> None:
    """It is warned of; other kinds, of other packages too, are there."""
    install("parrots", {"parrot": "parrots_g:Parrot"}, {"parrots_g": AGENT})
    install("a-broken-one", {}, {})
    (tmp_path / "site" / "a-broken-one-1.0.dist-info" / "entry_points.txt").write_bytes(entries)
    assert "mine" in load(tmp_path, "echo").servers
    assert "mine" in load(tmp_path, "parrot").servers
    assert str(tmp_path / "site") in caplog.text


@pytest.mark.parametrize("metadata", ["Name: parrots", ""])
def test_package_that_is_found_twice_counts_once(
    tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch, metadata: str
) -> None:
    """Such as one that is installed and also lies in the working directory; one without a name, too."""
    install("parrots", {"parrot": "parrots_h:Parrot"}, {"parrots_h": AGENT})
    site = tmp_path / "site"
    (site / "parrots-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\n{metadata}\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    assert "mine" in load(tmp_path, "parrot").servers


def test_unknown_kind_is_told_which_there_are(tmp_path: Path, install: Install) -> None:
    """Those of other packages are among them, though none is imported."""
    install("parrots", {"parrot": "parrots_c:Parrot"}, {"parrots_c": AGENT})
    with pytest.raises(ConfigurationError, match=r"one of .*echo, .*parrot, python"):
        load(tmp_path, "parot")
    assert "parrots_c" not in sys.modules


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        ("echo", "parrots_d:Parrot", "the agent 'echo' is built in, and {} offers one of that name"),
        ("broken", "broken_d:Agent", "the agent 'broken' cannot be imported: {} raised RuntimeError: no licence."),
        ("leaving", "leaving_d:Agent", "the agent 'leaving' cannot be imported: {} raised SystemExit: 3."),
        ("gone", "parrots_d:Gone", "the agent 'gone' cannot be imported: {} raised AttributeError: "),
        ("lost", "no_such_module_d:Agent", "the agent 'lost' cannot be imported: {} raised ModuleNotFoundError: "),
        ("stranger", "parrots_d:Stranger", "the agent 'stranger' is unusable: {} is no subclass of "),
        ("module", "parrots_d", "the agent 'module' is unusable: {} is no subclass of "),
        ("silent", "parrots_d:Silent", "the agent 'silent' is unusable: {} is no subclass of "),
        ("bare", "parrots_d:Bare", "the agent 'bare' is unusable: {} has no `Options`"),
    ],
)
def test_kind_that_cannot_be_used_is_told_with_its_package(
    tmp_path: Path, install: Install, kind: str, value: str, told: str
) -> None:
    """The server, the kind, the package, the entry point, and the error."""
    modules = {"parrots_d": AGENT, "broken_d": "raise RuntimeError('no licence')", "leaving_d": "raise SystemExit(3)"}
    install("parrots", {kind: value}, modules)
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, kind)
    entry_point = f"the entry point '{value}' of the package parrots"
    assert f"servers.toml: servers.mine: {told.format(entry_point)}" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "raised"), [("Fragile", "KeyError: 'seed'"), ("Empty", "TypeError: Empty.__init__() takes 1 positional")]
)
def test_kind_that_cannot_be_made_is_told(tmp_path: Path, install: Install, kind: str, raised: str) -> None:
    """Its constructor is code of others: whatever it raises names the server and the kind."""
    install("parrots", {"parrot": f"parrots_f:{kind}"}, {"parrots_f": AGENT})
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, "parrot")
    assert f"servers.mine: the agent 'parrot' cannot be made: it raised {raised}" in str(caught.value)


def test_kind_that_two_packages_offer_is_told_with_both(tmp_path: Path, install: Install) -> None:
    """Which one was meant is not guessed."""
    install("parrots", {"parrot": "parrots_e:Parrot"}, {"parrots_e": AGENT})
    install("more-parrots", {"parrot": "more_e:Parrot"}, {"more_e": AGENT})
    with pytest.raises(ConfigurationError, match="the agent 'parrot' is offered twice: ") as caught:
        load(tmp_path, "parrot")
    assert "package parrots" in str(caught.value)
    assert "package more-parrots" in str(caught.value)
