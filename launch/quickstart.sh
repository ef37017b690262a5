#!/usr/bin/env bash
# Sets up .venv/ (or finds it done), trains the ControlNet of recipes/controlnet_canny.yaml, and says
# where its report and exports lie. Arguments are overrides of the recipe: train.steps=50 output=outputs/short
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
recipe=recipes/controlnet_canny.yaml
bash launch/setup.sh

output=$(sed -n 's/^output: *//p' "$recipe")
for argument in "$@"; do
  if [[ $argument == output=* ]]; then
    output=${argument#output=}
  fi
done

# The precision named here only silences the launcher: the recipe's is what counts.
options=(--quiet --num_processes 1 --num_machines 1 --dynamo_backend no --mixed_precision no)
if ! .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  options+=(--cpu)
  # Without this the launcher sets one thread, whatever the machine has.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(.venv/bin/python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')}"
fi

wait_for_group() { # the launcher dies of a signal at once, while the trainer it started may still be saving
  .venv/bin/python - "$1" <<'PY'
import os
import sys
import time

import psutil


def alive(group: int) -> bool:
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getpgid(process.info["pid"]) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        except (ProcessLookupError, PermissionError):
            continue
    return False


while alive(int(sys.argv[1])):
    time.sleep(0.2)
PY
}

# Job control gives the launcher and its trainer a process group of their own, so that a signal reaches both.
signal=
set -m
.venv/bin/accelerate launch "${options[@]}" tuner/train.py "$recipe" "$@" &
group=$!
set +m
forward() {
  # Always as TERM: the trainer saves and ends, and the launcher ends without a traceback.
  # A second Ctrl-C does not wait for the saving.
  local send=TERM
  if [[ $signal == INT && $1 == INT ]]; then
    send=KILL
  fi
  signal=$1
  kill -s "$send" -- "-$group" 2>/dev/null || true
}
trap 'forward TERM' TERM
trap 'forward INT' INT
trap 'forward HUP' HUP

status=0
wait "$group" || status=$?
if [[ -n $signal ]]; then
  wait_for_group "$group" &
  watcher=$!
  while kill -0 "$watcher" 2>/dev/null; do
    wait "$watcher" 2>/dev/null || true
  done
  printf 'quickstart: stopped by SIG%s; the same command continues the run\n' "$signal" >&2
  exit $((128 + $(kill -l "$signal")))
fi
if ((status != 0)); then
  printf 'quickstart: the run failed (see above). With the cause removed, the same command continues it.\n' >&2
  exit "$status"
fi

printf '\n'
if [[ -f $output/report.html ]]; then
  printf 'quickstart: report   %s\n' "$output/report.html"
fi
find "$output/export" -maxdepth 2 \( -name '*.safetensors' -o -type d -path '*/diffusers/*' \) 2>/dev/null |
  sort | sed 's/^/quickstart: export   /' || true
