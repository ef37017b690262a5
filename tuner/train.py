"""What `accelerate launch tuner/train.py RECIPE [KEY=VALUE ...]` runs: `tuner train`, installed or not."""

from __future__ import annotations

import os
import sys

# Python puts the folder of a script first on sys.path. With tuner/ there, its modules could hide others and
# `import tuner` would find an installed copy or nothing: the folder above belongs there.
folder = os.path.dirname(os.path.realpath(__file__))
if sys.path and os.path.realpath(sys.path[0]) == folder:
    del sys.path[0]
sys.path.insert(0, os.path.dirname(folder))

from tuner.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
