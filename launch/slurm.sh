#!/usr/bin/env bash
# Submits a pretraining job to Slurm: one process a GPU on one or several nodes, requeued when a restart helps.
#
#   launch/slurm.sh --partition=P --time=HH:MM:SS [OPTIONS] -- --config=FILE.py --workdir=RUN [--config.key=value ...]
#
# Run it on a login node, in a checkout on a file system that the compute nodes see. RUN must be on one, too.
#
#   --partition=P        where to run; it also decides the kind of GPU and whether the job may be preempted
#   --time=HH:MM:SS      time limit of one run; the job is requeued until the training has finished
#   --nodes=N            (1)
#   --gpus_per_node=N    also the processes a node: JAX gives each process of a Slurm job one GPU (8)
#   --cpus_per_gpu=N     (8)
#   --memory=SIZE        a node; 0 is all of it (0)
#   --account=A --qos=Q  as the site wants them
#   --job_name=NAME      (infmae)
#   --logs=DIR           absolute folder for the job's log (this checkout's runs/slurm)
#   --save_seconds=N     SIGTERM so long before the time limit, to save and requeue (120)
#   --requeues=N         give up after N of them (50)
#   --dry-run            print the commands and do nothing
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launch/steps.sh"

root=$(dirname "$launch")
partition='' time='' nodes=1 gpus_per_node=8 cpus_per_gpu=8 memory=0 account='' qos='' job_name=infmae
logs=$root/runs/slurm save_seconds=120 requeues=50
parse_options "partition= time= nodes= gpus_per_node= cpus_per_gpu= memory= account= qos= job_name= logs= save_seconds=
  requeues=" "$@"
need partition time
need_number nodes gpus_per_node cpus_per_gpu save_seconds requeues
if [[ " ${arguments[*]}" != *" --workdir="?* ]]; then fail "after --, --workdir=RUN is needed"; fi

options=("--job-name=$job_name" "--partition=$partition" "--time=$time" "--nodes=$nodes"
  "--ntasks-per-node=$gpus_per_node" "--gpus-per-node=$gpus_per_node" "--cpus-per-task=$cpus_per_gpu" "--mem=$memory")
if [ -n "$account" ]; then options+=("--account=$account"); fi
if [ -n "$qos" ]; then options+=("--qos=$qos"); fi
# No "B:" before TERM: the signal is for the training processes. The log goes on where the last run left it.
options+=("--signal=TERM@$save_seconds" --requeue --open-mode=append "--output=$logs/%x-%j.log" "--chdir=$root")

step env "INFMAE_EXTRAS=${INFMAE_EXTRAS:-cuda}" "$launch/install.sh"
step mkdir -p "$logs"
step sbatch "${options[@]}" "$launch/slurm_job.sh" "--requeues=$requeues" -- "${arguments[@]}"
