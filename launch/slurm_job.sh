#!/usr/bin/env bash
# The batch script that slurm.sh submits: starts one training process a task, and requeues the job when a restart
# can help.
#
#   sbatch ... launch/slurm_job.sh [--requeues=N] [--dry-run] -- --config=FILE.py --workdir=RUN ...
set -euo pipefail
# Slurm runs a copy of this file in a folder of its own; slurm.sh makes the checkout the current folder.
source launch/steps.sh

requeues=50
parse_options "requeues=" "$@"
need_number requeues

# SIGTERM reaches this script when the job is cancelled or preempted: then Slurm decides what comes next, not we.
cancelled=
trap 'cancelled=true' TERM

INFMAE_JOB_SECRET=$(job_secret)
export INFMAE_JOB_SECRET # srun hands it to all tasks

code=0
# Not --kill-on-bad-exit: the first process to leave after a save must not end those that still write. Processes that
# lost another one end by themselves; --wait is for those that cannot.
step srun --kill-on-bad-exit=0 --wait=600 launch/restart.sh --times=0 --raise_final -- \
  .venv/bin/python -m infmae_jax.pretrain --config.distributed.method=slurm "${arguments[@]}" || code=$?
code=$(lower_final_code "$code")

if may_restart "$code" && [ -z "$cancelled" ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$requeues" ]; then
    echo "error: gave up after $requeues requeues; the last exit code is $code" >&2
  else
    step scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
