"""`acp-gateway keys`, and what its commands share with the others: options of files, mistakes told in one line."""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, cast

import typer

from gateway.auth import KeyFile, KeyFileError, Scope, UnknownKey
from gateway.config import SettingError
from gateway.supervisor import RuntimeFailed

keys_app = typer.Typer(help="API keys: make, list and revoke them.", no_args_is_help=True)

DATA_DIR = Path(".acp")

DataDir = Annotated[
    Path,
    typer.Option(envvar="ACP_DATA_DIR", help="Folder for runs, keys and tokens; made when it is missing."),
]
KeysFile = Annotated[
    Path | None,
    typer.Option(envvar="ACP_KEYS_FILE", help="The key file; without, keys.json in the data directory."),
]


class Complaints:
    """Tells a setting's or a file's mistake in one line, without a traceback; exit code 2."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, SettingError | KeyFileError | UnknownKey | RuntimeFailed | ValueError | OSError):
            print(f"acp-gateway: {error}", file=sys.stderr)
            raise typer.Exit(2) from None


def key_file(path: Path | None, data_dir: Path) -> KeyFile:
    """Return the key file that was named, or that of the data directory."""
    return KeyFile(data_dir / "keys.json" if path is None else path)


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="What the key is for; shown by `keys list`.")],
    organization: Annotated[str, typer.Option(help="The organization that the key belongs to.")] = "default",
    scope: Annotated[
        list[str] | None,
        typer.Option(help='What it may do: "*", "execute", "runs:read"; may be given again.'),
    ] = None,
    expires_days: Annotated[int | None, typer.Option(min=1, help="Days until it expires; without, never.")] = None,
    keys_file: KeysFile = None,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Make a key and print it, this once. Running gateways know it within a second."""
    with Complaints():
        expires_at = None if expires_days is None else datetime.now(UTC) + timedelta(days=expires_days)
        scopes = cast(tuple[Scope, ...], tuple(scope or ("*",)))
        keys = key_file(keys_file, data_dir)
        keys.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        text, _ = keys.create(name, organization, scopes, expires_at)
        print(text)


@keys_app.command("list")
def keys_list(keys_file: KeysFile = None, data_dir: DataDir = DATA_DIR) -> None:
    """Show the keys, without their secrets."""
    with Complaints():
        for key in key_file(keys_file, data_dir).load():
            state = (
                "revoked" if key.revoked_at else f"expires {key.expires_at:%Y-%m-%d}" if key.expires_at else "active"
            )
            print(f"{key.id}  {key.organization}  {','.join(key.scopes)}  {state}  {key.name}")


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(help="The id: the 12 digits in the middle of the key.")],
    keys_file: KeysFile = None,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """End a key for good. Running gateways refuse it within a second."""
    with Complaints():
        key_file(keys_file, data_dir).revoke(key_id)
        print(f"{key_id} is revoked.")
