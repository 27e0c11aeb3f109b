#!/usr/bin/env bash
# Pretrains on the GPUs of this host, and starts again when a restart helps (see restart.sh).
#
#   launch/gpu_host.sh [OPTIONS] -- --config=FILE.py --workdir=RUN [--config.key=value ...]
#
# Without --image in the .venv of this checkout (made on first use, JAX for CUDA 13); with it in a container.
#
#   --image=IMAGE        a container image made by launch/image.sh --target=cuda
#   --folders=DIR,DIR    host folders that the container sees under the same paths: runs, shards, own configs
#   --name=NAME          of the container (infmae)
#   --shm_size=SIZE      shared memory, for NCCL and data workers (16g)
#   --times=N            restarts an hour before giving up (10)
#   --dry-run            print the commands and do nothing
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launch/steps.sh"

image='' folders='' name=infmae shm_size=16g times=10
parse_options "image= folders= name= shm_size= times=" "$@"
need_number times
if [ -n "$image" ]; then need_pinned_image "$image"; fi
if [ -z "$image" ] && [ -n "$folders" ]; then fail "--folders is for containers: give --image=... too"; fi

if [ -z "$image" ]; then
  step env "INFMAE_EXTRAS=${INFMAE_EXTRAS:-cuda}" "$launch/install.sh"
  last_step "$launch/restart.sh" "--times=$times" -- \
    "$(dirname "$launch")/.venv/bin/python" -m infmae_jax.pretrain "${arguments[@]}"
  exit 0
fi

need folders
volumes=()
IFS=, read -r -a folder_list <<<"$folders"
for folder in "${folder_list[@]}"; do
  if [[ $folder != /* ]]; then fail "--folders must be absolute paths, got $folder"; fi
  volumes+=("--volume=$folder:$folder")
done
# --init: signals reach the training from its first moment. The caller's user, so that what it writes is the caller's.
# Docker's own --restart cannot tell exit codes apart and would repeat mistakes forever.
last_step "$launch/restart.sh" "--times=$times" -- \
  docker run --rm --init "--name=$name" --gpus=all "--user=$(id -u):$(id -g)" "--shm-size=$shm_size" \
  --ulimit=memlock=-1 --stop-timeout=120 --volume=infmae-cache:/cache "${volumes[@]}" \
  "$image" python -m infmae_jax.pretrain "${arguments[@]}"
