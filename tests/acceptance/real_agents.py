"""Real agents of other makers, each installed into a folder of its own inside this Python environment.

`python -m tests.acceptance.real_agents` installs what is not there yet. What it cannot install it names, with the
reason, which the tests of that agent show where they are skipped; under CI=true they fail instead.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

_FOLDER = Path(sys.prefix) / "agents"
_LIMIT_SECONDS = 600.0
_PYTHONS = ("python3.12", "python3.13", "python3.14")


class RealAgent(msgspec.Struct, frozen=True):
    """An agent by its maker's name for it. `install` fills a folder, in which `program` is the command then."""

    name: str
    version: str
    program: str
    install: Callable[["RealAgent", Path], None]

    @property
    def folder(self) -> Path:
        """Where this version is installed."""
        return _FOLDER / f"{self.name}-{self.version}"

    @property
    def missing_file(self) -> Path:
        """What says why it could not be installed."""
        return _FOLDER / f"{self.name}.missing"

    def require(self) -> str:
        """Return the command. Where it is not installed the test is skipped, or fails under CI=true."""
        command = self.folder / self.program
        if command.exists() and not self.missing_file.exists():
            return str(command)
        reason = "run `make test`, which installs it"
        if self.missing_file.exists():
            reason = self.missing_file.read_text()
        if os.environ.get("CI") == "true":
            pytest.fail(f"{self.name} is not installed: {reason}", pytrace=False)
        pytest.skip(f"{self.name} is not installed: {reason}")

    def see_to(self) -> str:
        """Install it if it is not; return what is to be said."""
        if self.folder.exists() and not self.missing_file.exists():
            return ""
        shutil.rmtree(self.folder, ignore_errors=True)
        _FOLDER.mkdir(exist_ok=True)
        self.missing_file.write_text("its installation was broken off; run `make test` again")
        try:
            self.install(self, self.folder)
            # Starting it once also leaves what Python compiles at the first start, which takes some seconds.
            _run(str(self.folder / self.program), "--version", **_homes(self.folder))
        except _CannotInstall as error:
            self.missing_file.write_text(str(error))
            return f"{self.name} is not installed, so its tests will be skipped: {error}"
        self.missing_file.unlink()
        return f"{self.name} {self.version} is installed."


class _CannotInstall(Exception):
    pass


def _run(*command: str, **environment: str) -> None:
    try:
        ended = subprocess.run(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_LIMIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _CannotInstall(str(error)) from error
    if ended.returncode != 0:
        last = " · ".join(ended.stdout.strip().splitlines()[-3:])
        raise _CannotInstall(f"`{command[0]} {command[1]} …` failed with {ended.returncode}: {last}")


def _homes(folder: Path) -> dict[str, str]:
    """Where a program may leave its files, beside the HOME that holds the settings of the installers."""
    return {f"XDG_{name}_HOME": str(folder / name.lower()) for name in ("CONFIG", "CACHE", "DATA", "STATE")}


def _install_by_pip(agent: RealAgent, folder: Path) -> None:
    python = next(_pythons(), None)
    if python is None:
        raise _CannotInstall(
            "it needs Python 3.12, 3.13 or 3.14, and none was found. Install one, "
            "or name it: PYTHON_FOR_AGENTS=/path/to/python make test"
        )
    _run(python, "-m", "venv", "--without-pip", str(folder))
    pip = (sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--disable-pip-version-check")
    _run(*pip, "install", "--quiet", "--no-compile", f"{agent.name}=={agent.version}")


def _pythons() -> Iterator[str]:
    """The interpreters here that are new enough, the one that was named first."""
    named = os.environ.get("PYTHON_FOR_AGENTS")
    candidates = [named] if named else [sys.executable, *_PYTHONS, "python3"]
    if not named:
        pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
        candidates += map(str, sorted(pyenv.glob("versions/3.1[234].*/bin/python3")))
    for candidate in candidates:
        try:
            _run(candidate, "-c", "import sys, venv; sys.exit(not (3, 12) <= sys.version_info < (3, 15))")
        except _CannotInstall:
            continue
        yield candidate


def _install_by_npm(agent: RealAgent, folder: Path) -> None:
    if shutil.which("npm") is None:
        raise _CannotInstall("it needs npm, which was not found. Install Node.js 20 or newer")
    folder.mkdir()
    temporary = folder / "temporary"
    temporary.mkdir()
    # Without the optional packages, one for each kind of machine, it fetches the one for this machine by itself.
    options = ("--omit=optional", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error")
    _run(
        *("npm", "install", "--prefix", str(folder), *options, f"{agent.name}@{agent.version}"),
        npm_config_cache=str(temporary),
        TMPDIR=str(temporary),
        **_homes(temporary),
    )
    shutil.rmtree(temporary)


FAST_AGENT = RealAgent("fast-agent-mcp", "0.10.39", "bin/fast-agent", _install_by_pip)
OPENCODE = RealAgent("opencode-ai", "1.18.33", "node_modules/.bin/opencode", _install_by_npm)


def main() -> None:
    """Install them all at once."""
    agents = (FAST_AGENT, OPENCODE)
    if any(not agent.folder.exists() for agent in agents):
        print("Installing real agents for the tests (half a minute) …", flush=True)
    with ThreadPoolExecutor() as threads:
        for said in threads.map(RealAgent.see_to, agents):
            if said:
                print(said, flush=True)


if __name__ == "__main__":
    main()
