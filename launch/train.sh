#!/usr/bin/env bash
# Trains a recipe on all GPUs of this machine, or as one of several machines that train together:
#   bash launch/train.sh RECIPE [KEY=VALUE ...]
# What it is told by the environment:
#   PROCESSES    training processes on this machine; if absent one for each GPU, or one
#   NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   with several machines: the same command on each of them
#   RESTARTS     so many times the processes of all machines start again, from their newest checkpoint, when
#                one was lost, or a machine, which comes back by the same command; NODE_RANK may be absent then
#   RUN_ID       tells this run from others at the same MASTER_ADDR:MASTER_PORT, where RESTARTS is given
#   UNFINISHED   the exit code of a run that was stopped before its end, on every machine; 0 if absent
#   WAIT         seconds that a stopped run may take for its step and its checkpoint; 600 if absent
#   SETUP=no     skips launch/setup.sh
# TERM, USR1, HUP and Ctrl-C are handed on to the training processes, which save and end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { printf 'train: %s\n' "$*" >&2; exit 2; }
if (($# == 0)); then
  fail 'no recipe; expected: bash launch/train.sh RECIPE [KEY=VALUE ...]'
fi
for name in NODES PROCESSES RESTARTS UNFINISHED WAIT; do
  if [[ -n ${!name:-} && ! ${!name} =~ ^[0-9]+$ ]]; then
    fail "$name: found ${!name}; expected a whole number"
  fi
done
if [[ ${SETUP:-} != no ]]; then
  bash launch/setup.sh
fi

nodes=${NODES:-1}
restarts=${RESTARTS:-0}
node=${NODE_RANK:-${SLURM_NODEID:-}}
processes=${PROCESSES:-$(.venv/bin/python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
together=$((nodes * processes))
# torchrun kills its processes so many seconds after a signal of its own; 30 may be too few for a step.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${WAIT:-600}"
torchrun=(.venv/bin/torchrun --nproc_per_node "$processes")
if ((together == 1 && restarts == 0)); then
  command=(.venv/bin/python)
elif ((nodes == 1)); then
  command=("${torchrun[@]}" --standalone)
else
  : "${MASTER_ADDR:?is the name of the first machine; it must be set where NODES is above 1}"
  command=("${torchrun[@]}" --nnodes "$nodes")
  if ((restarts)); then
    # Else torchrun (2.13) does not tell a machine that comes later where the first one is, and all of them end.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    command+=(--rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}"
      --rdzv_id "${RUN_ID:-${SLURM_JOB_ID:-tuner}}")
    if [[ -n $node ]]; then # else torchrun looks whether MASTER_ADDR is a name of its own, which may mislead it
      command+=(--rdzv_conf "is_host=$((node == 0 ? 1 : 0))")
    fi
  else
    command+=(--node_rank "${node:?NODE_RANK is missing: 0 on the first machine}"
      --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
  fi
fi
if ((restarts)); then
  command+=(--max_restarts "$restarts")
fi

# A group of its own: a terminal's Ctrl-C comes to this script alone.
set -m
(
  trap '' USR1 # which Slurm may send to every process of a job: torchrun would die of it
  exec "${command[@]}" tuner/train.py "$@"
) &
launcher=$!
set +m

trainers() { # the processes of this machine that train, once all are there
  if [[ ${command[0]} == *python ]]; then
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
  local send=$1 pids=() until=$((SECONDS + 60))
  if ((restarts)) && [[ $1 == INT ]]; then
    send=TERM # a process that ends by Ctrl-C has failed for torchrun, which would start it again
    if [[ $asked == INT ]]; then
      send=KILL
    fi
  fi
  asked=$1
  while kill -0 "$launcher" 2>/dev/null; do
    mapfile -t pids < <(trainers)
    if [[ $send == KILL ]]; then
      kill -s KILL "$launcher" "${pids[@]}" 2>/dev/null || true
      break
    fi
    if ((${#pids[@]})); then
      kill -s "$send" "${pids[@]}" 2>/dev/null || true
      break
    fi
    if ((SECONDS > until)); then # torchrun still waits for other machines: there is nothing to save
      kill -s TERM "$launcher" 2>/dev/null || true
      break
    fi
    sleep 0.2
  done
}
trap 'forward TERM' TERM HUP
trap 'forward USR1' USR1
trap 'forward INT' INT

finished() { # whether the run came to its end; the trainers agree on stopping, so that each machine has to ask
  .venv/bin/python - "$@" <<'PY'
import sys
from pathlib import Path

from tuner.recipe import load
from tuner.resume import DONE

sys.exit(not (Path(load(Path(sys.argv[1]), sys.argv[2:]).output) / DONE).exists())
PY
}

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
if ((status == 0)) && [[ -n ${UNFINISHED:-} ]] && ! finished "$@"; then
  printf 'train: the run was stopped before its end; exit code %s, so that it is started again\n' "$UNFINISHED" >&2
  status=$UNFINISHED
fi
exit "$status"
