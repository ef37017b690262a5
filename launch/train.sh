#!/usr/bin/env bash
# Trains a recipe on all GPUs of this machine, or as one of several machines that train together:
#   bash launch/train.sh RECIPE [KEY=VALUE ...]
# What it is told by the environment:
#   PROCESSES    training processes on this machine; if absent one for each GPU, or one
#   NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   with several machines: the same command on each of them
#   WAIT         seconds that a stopped run may take for its step and its checkpoint; 600 if absent
#   SETUP=no     skips launch/setup.sh
# TERM, USR1, HUP and Ctrl-C are handed on to the training processes, which save and end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if (($# == 0)); then
  printf 'train: no recipe; expected: bash launch/train.sh RECIPE [KEY=VALUE ...]\n' >&2
  exit 2
fi
if [[ ${SETUP:-} != no ]]; then
  bash launch/setup.sh
fi

nodes=${NODES:-1}
processes=${PROCESSES:-$(.venv/bin/python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
together=$((nodes * processes))
# torchrun kills its processes so many seconds after a signal of its own; 30 may be too few for a step.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${WAIT:-600}"
if ((together == 1)); then
  command=(.venv/bin/python)
elif ((nodes == 1)); then
  command=(.venv/bin/torchrun --standalone --nproc_per_node "$processes")
else
  : "${MASTER_ADDR:?is the name of the first machine; it must be set where NODES is above 1}"
  command=(.venv/bin/torchrun --nproc_per_node "$processes" --nnodes "$nodes"
    --node_rank "${NODE_RANK:-${SLURM_NODEID:?NODE_RANK is missing: 0 on the first machine}}"
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
fi

# A group of its own: a terminal's Ctrl-C comes to this script alone.
set -m
"${command[@]}" tuner/train.py "$@" &
launcher=$!
set +m

trainers() { # the processes of this machine that train, once all are there
  if ((together == 1)); then
    printf '%s\n' "$launcher"
    return
  fi
  .venv/bin/python - "$launcher" "$processes" <<'PY'
import sys

import psutil

found = []
try:
    for child in psutil.Process(int(sys.argv[1])).children():
        try:
            if "tuner/train.py" in child.cmdline():
                found.append(child.pid)
        except psutil.Error:
            continue
except psutil.Error:
    pass
if len(found) == int(sys.argv[2]):
    print(*found, sep="\n")
PY
}

asked=
forward() {
  asked=$1
  local pids=()
  while kill -0 "$launcher" 2>/dev/null; do
    mapfile -t pids < <(trainers)
    if ((${#pids[@]})); then
      kill -s "$1" "${pids[@]}" 2>/dev/null || true
      break
    fi
    sleep 0.2
  done
}
trap 'forward TERM' TERM HUP
trap 'forward USR1' USR1
trap 'forward INT' INT

status=0
while :; do
  status=0
  wait "$launcher" || status=$?
  if ((status <= 128)) || ! kill -0 "$launcher" 2>/dev/null; then
    break # else a signal ended the waiting, not the training
  fi
done
if [[ -n $asked ]]; then
  again=0
  wait "$launcher" 2>/dev/null || again=$?
  if ((again != 127)); then
    status=$again # it ended while a signal was handed on
  fi
  printf 'train: SIG%s was handed on; the same command continues the run\n' "$asked" >&2
  if [[ $asked == INT ]]; then
    exit 130 # torchrun makes 1 of it
  fi
fi
exit "$status"
