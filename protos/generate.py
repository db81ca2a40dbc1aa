"""Generate the Python code and the type stubs of protos/**/*.proto, beside the sources.

The protos are laid out as `acp/runs/v1`, relative to this folder, as buf wants it. In Python they live under
`protos.acp.runs.v1`: a top-level package `acp` belongs to the Agent Client Protocol's SDK. protoc knows no such
prefix, so the imports between generated files are given it here.

    python protos/generate.py           write
    python protos/generate.py --check   write nothing; exit 1 when what is committed differs
"""

import argparse
import os
import re
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
_IMPORT = re.compile(rb"^(from|import) acp\.", re.MULTILINE)
_REFERENCE = re.compile(rb"(?<![\w.\"'/])acp\.runs\.v1\.(\w+_pb2)")


def generate(into: Path) -> dict[Path, bytes]:
    """Return the generated files by their path relative to `protos/`, made in the folder `into`."""
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("acp/**/*.proto"))
    bundled = resources.files("grpc_tools") / "_proto"
    flags = [
        f"--proto_path={ROOT}",
        f"--proto_path={ROOT / 'third_party'}",
        f"--proto_path={bundled}",
        f"--python_out={into}",
        f"--grpc_python_out={into}",
        f"--mypy_out=quiet:{into}",
        f"--mypy_grpc_out=quiet,only_async:{into}",
    ]
    # protoc finds its plugins on the PATH: those beside this interpreter.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    if protoc.main(["protoc", *flags, *sources]) != 0:
        raise SystemExit("protoc failed")
    made = {path.relative_to(into): path.read_bytes() for path in into.rglob("*.py*")}
    return {
        name: _REFERENCE.sub(rb"protos.acp.runs.v1.\1", _IMPORT.sub(rb"\1 protos.acp.", text))
        for name, text in made.items()
    }


def main() -> int:
    """Write the generated files, or with --check compare them; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        made = generate(Path(folder))
    if not check:
        for name, text in made.items():
            (ROOT / name).write_bytes(text)
        return 0
    committed = {path.relative_to(ROOT) for path in ROOT.glob("acp/**/*_pb2*.py*") if path.suffix != ".pyc"}
    drift = [n for n, text in made.items() if n not in committed or (ROOT / n).read_bytes() != text]
    drift += [name for name in committed if name not in made]
    for name in sorted(drift):
        print(f"protos/{name} is not what its source generates; run `make protos`", file=sys.stderr)
    return 1 if drift else 0


if __name__ == "__main__":
    sys.exit(main())
