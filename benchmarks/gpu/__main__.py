"""Start the command, as `python -m benchmarks.gpu` or `python benchmarks/gpu`."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Started as a folder, Python puts that folder first, whose modules are not top-level.
sys.path[:] = [
    p for p in sys.path if pathlib.Path(p).resolve() != ROOT / "benchmarks/gpu"
]
for folder in (ROOT / "benchmarks", ROOT):
    sys.path.insert(0, str(folder))

from benchmarks.gpu import command  # noqa: E402 - the path comes first

if __name__ == "__main__":
    sys.exit(command.main())
