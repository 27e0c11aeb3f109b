#!/usr/bin/env bash
# Submits a pretraining job to a cluster made by xpk (Google's Accelerated Processing Kit), TPUs only; for GPUs and for
# clusters made otherwise there is gke.sh.
#
#   launch/xpk.sh --project=P --zone=Z --cluster=C --tpu_type=T --capacity=spot|on_demand --storage=S --image=I \
#       [OPTIONS] -- --config=FILE.py --workdir=/mnt/infmae/RUN [--config.key=value ...]
#
#   --cluster=C          made by xpk cluster create
#   --tpu_type=T         of each slice, for example v5litepod-16
#   --slices=N           (1)
#   --capacity=spot|on_demand   cheap nodes that can be taken away, or not
#   --storage=S          attached with xpk storage attach, mounted as /mnt/infmae: runs and shards
#   --image=IMAGE        made by launch/image.sh --target=tpu, in a registry the nodes may read
#   --name=NAME          of the workload (infmae)
#   --priority=P         very-low, low, medium, high or very-high (medium)
#   --grace_seconds=N    from SIGTERM to SIGKILL; nodes taken away allow about 25 s (120)
#   --restarts=N         then it fails (100)
#   --dry-run            print the command and do nothing
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launch/steps.sh"

project='' zone='' cluster='' tpu_type='' slices=1 capacity='' storage='' image='' name=infmae
priority=medium grace_seconds=120 restarts=100
parse_options "project= zone= cluster= tpu_type= slices= capacity= storage= image= name= priority=
  grace_seconds= restarts=" "$@"
need project zone cluster tpu_type storage
need_number slices grace_seconds restarts
need_choice capacity spot on_demand
need image
need_pinned_image "$image"
need_shared_workdir --storage

# xpk restarts on 42 and 127 to 255 of itself. exec: xpk sends SIGTERM to the process it started, which must be ours.
step xpk workload create "--project=$project" "--zone=$zone" "--cluster=$cluster" "--workload=$name" \
  "--tpu-type=$tpu_type" "--num-slices=$slices" "--${capacity/_/-}" "--storage=$storage" "--docker-image=$image" \
  "--priority=$priority" "--max-restarts=$restarts" --restart-on-exit-codes=75,76 \
  "--termination-grace-period-seconds=$grace_seconds" \
  "--command=exec $(quote python -m infmae_jax.pretrain --config.distributed.method=tpu "${arguments[@]}")"
