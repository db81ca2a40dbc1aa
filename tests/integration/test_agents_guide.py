"""docs/agents.md: what it shows works as it stands."""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime_service.agent_check import check_agent
from runtime_service.agents import Finding
from runtime_service.questions import QuestionSettings
from runtime_service.registry import load_registry
from tests.support import run_async

GUIDE = (Path(__file__).parents[2] / "docs" / "agents.md").read_text("utf-8")
BLOCKS = re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", GUIDE, re.M | re.S)
"""Each block that is a file: its name, and its text. Those of one name belong together, but for each servers.toml."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files of the guide, the package in it as if it was installed."""
    names = {name for name, _ in BLOCKS} - {"servers.toml"}
    assert names == {"my_agents.py", "my_kind.py", "test_my_agents.py", "pyproject.toml"}
    for name in names:
        (tmp_path / name).write_text("\n".join(text for each, text in BLOCKS if each == name))
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    information = tmp_path / "my_greeter-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1.0\n")
    ((group, kinds),) = project["entry-points"].items()
    lines = [f"{kind} = {value}" for kind, value in kinds.items()]
    (information / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("TRAVEL_AGENT_TOKEN", raising=False)
    yield tmp_path
    for name in names:
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.mark.parametrize("text", [text for name, text in BLOCKS if name == "servers.toml"])
def test_servers_of_the_guide_pass_their_check(folder: Path, text: str) -> None:
    """Each servers.toml is one that a service starts with; what is missing is a key or a command at most."""
    (folder / "servers.toml").write_text(text)
    registry = load_registry(folder / "servers.toml")
    found: list[Finding] = []

    async def main() -> None:
        for server in registry.servers.values():
            await check_agent(server, found.append, 10)
        await registry.close()

    run_async(main())
    assert found
    missing = [finding.text for finding in found if not finding.works]
    of_others = ("OPENAI_API_KEY", "TRAVEL_AGENT_TOKEN", "command 'fast-agent'")
    assert [text for text in missing if not any(each in text for each in of_others)] == []


def test_tests_of_the_guide_pass(folder: Path) -> None:
    """They are run as pytest would."""
    import test_my_agents  # type: ignore[import-not-found]

    tests = [test for name, test in vars(test_my_agents).items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()


def test_guide_tells_the_default_settings_of_questions() -> None:
    """The table that it shows is what holds without one, but for the kinds of tools."""
    (text,) = [text for name, text in BLOCKS if name == "servers.toml" and "questions" in text]
    shown = tomllib.loads(text)["servers"]["cleaner"]["questions"]
    shown["allow_tool_kinds"] = ()
    assert QuestionSettings(**shown) == QuestionSettings()
    assert set(shown) == set(QuestionSettings.__struct_fields__)
