"""Filling a store before it is measured."""

import json
import tempfile
from pathlib import Path

from benchmarks.environment import EVENTS, TEXT
from benchmarks.load import run_load
from benchmarks.product import echo, product, runs_path


def fill_store(data_dir: Path, runs: int) -> None:
    """Make `data_dir` the data directory of a product that has completed `runs` runs of ten messages.

    The runs are made over HTTP: right whatever the schema, but some minutes for 10^6.
    """
    with tempfile.TemporaryDirectory() as scratch, product(Path(scratch), data_dir=data_dir) as server:
        run_load(
            server, runs_path(echo(EVENTS)), json.dumps({"content": TEXT}), connections=64, requests=runs
        )
