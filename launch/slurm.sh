#!/usr/bin/env bash
# A batch script for Slurm, submitted from the checkout:
#   sbatch --nodes=2 --gpus-per-node=4 launch/slurm.sh recipes/sdxl/lora.yaml output=/scratch/me/lora
# Two minutes before its time is over the run saves, the job goes back into the queue, and it continues.
#SBATCH --job-name=tuner
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail
# Slurm runs a copy of this file, from a folder of its own.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
if [[ ! -f launch/train.sh ]]; then
  printf 'slurm: %s is no checkout of tuner; submit from there: sbatch launch/slurm.sh RECIPE\n' "$PWD" >&2
  exit 2
fi
for argument in "$@"; do
  if [[ $argument == train.resume=never ]]; then
    printf 'slurm: train.resume=never would start anew each time that the job comes from the queue\n' >&2
    exit 2
  fi
done
bash launch/setup.sh # once, not on every machine

export SETUP=no NODES="${SLURM_JOB_NUM_NODES:-1}"
if ((NODES > 1)); then
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  MASTER_ADDR=${hosts%%$'\n'*} # the first line: a pipe into head would now and then end with SIGPIPE
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
  export MASTER_ADDR MASTER_PORT
fi
srun --kill-on-bad-exit=1 bash launch/train.sh "$@" &
step=$!

# srun hands USR1 on to its tasks. Of TERM it would make KILL, so that TERM is handed on as USR1, too.
asked=
trap 'asked=USR1; kill -s USR1 "$step" 2>/dev/null || true' USR1
trap 'asked=TERM; kill -s USR1 "$step" 2>/dev/null || true' TERM

status=0
while :; do
  status=0
  wait "$step" || status=$?
  if ((status <= 128)) || ! kill -0 "$step" 2>/dev/null; then
    break # else a signal ended the waiting, not the step
  fi
done
if [[ -n $asked ]]; then
  again=0
  wait "$step" 2>/dev/null || again=$?
  if ((again != 127)); then
    status=$again
  fi
fi
if [[ $asked == USR1 ]] && ((status == 0)); then
  printf 'slurm: the time is nearly over; the job goes back into the queue\n'
  # Had it come to its end meanwhile, it will say so and be done.
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
