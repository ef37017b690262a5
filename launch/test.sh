#!/usr/bin/env bash
# Sets up .venv/ (or finds it done) and runs the tests. Arguments go to pytest:
#   bash launch/test.sh                    everything but the slow tests
#   bash launch/test.sh -m slow            the slow ones; -m "" for all
#   bash launch/test.sh tests/unit -k canny
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
# No test may need a network once the packages are in.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
# As many at once as there are processors, each on one thread; `-n 0` behind it: one after another.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
