#!/usr/bin/env bash
# Starts the training on one worker of a TPU VM: mounts the shared file system, pulls the image, runs the container.
#
# tpu_vm.sh makes it the startup script, so that root runs it on every worker at every boot. It stands alone: nothing
# else of the checkout is on the worker. Settings come from the environment or else from the instance's metadata:
#
#   INFMAE_IMAGE       infmae-image        image made by launch/image.sh --target=tpu
#   INFMAE_MOUNT       infmae-mount        HOST:/SHARE (NFS) or gs://BUCKET (needs gcsfuse), mounted at /mnt/infmae
#   INFMAE_SECRET      infmae-secret       by which the workers of the job know each other
#   INFMAE_ARGUMENTS   infmae-arguments    arguments of the training, quoted for a shell
#
#   sudo bash tpu_worker.sh [--help | --dry-run]
#
# /run/infmae-state says "starting:0", or "exited:2" when something here failed; then the container's own state counts.
set -euo pipefail

dry_run=''
case ${1:-} in
  '') ;;
  --dry-run) dry_run=true ;;
  --help)
    sed -n '2,/^[^#]/ { /^#/ s/^# \{0,1\}//p }' "$0"
    exit 0
    ;;
  *)
    echo "error: unknown option $1; see --help" >&2
    exit 2
    ;;
esac

state=${INFMAE_STATE:-/run/infmae-state}
folder=/mnt/infmae
metadata=http://metadata.google.internal/computeMetadata/v1/instance

setting() {
  local variable=INFMAE_${1^^}
  if [ -n "${!variable:-}" ]; then
    echo "${!variable}"
  else
    curl --silent --show-error --fail --header 'Metadata-Flavor: Google' "$metadata/attributes/infmae-$1"
  fi
}

# step COMMAND...: tries it up to five times, since networks come up late; with --dry-run prints it.
step() {
  local attempt
  if [ -n "$dry_run" ]; then
    echo "${@@Q}"
    return
  fi
  for attempt in 1 2 3 4 5; do
    if "$@"; then return 0; fi
    sleep "$((attempt * ${INFMAE_RETRY_SECONDS:-10}))"
  done
  return 1
}

note() {
  if [ -z "$dry_run" ]; then echo "$1" >"$state"; fi
}

trap 'note exited:2' ERR
note starting:0

image=$(setting image)
mount=$(setting mount)
INFMAE_JOB_SECRET=$(setting secret 2>/dev/null || true) # slices requested before there was one have none
export INFMAE_JOB_SECRET
quoted=$(setting arguments)
arguments=()
eval "arguments=($quoted)" # written by tpu_vm.sh, quoted

if docker container inspect infmae >/dev/null 2>&1; then
  step docker stop --time=120 infmae
  step docker rm infmae
fi
step mkdir -p "$folder"
if ! mountpoint --quiet "$folder"; then
  case $mount in
    gs://*) step gcsfuse --implicit-dirs -o allow_other "${mount#gs://}" "$folder" ;;
    *)
      if ! command -v mount.nfs >/dev/null; then step apt-get install --yes --quiet nfs-common; fi
      step mount -t nfs -o hard "$mount" "$folder"
      ;;
  esac
fi
registry=${image%%/*}
if [[ $registry == *.* ]]; then step gcloud auth configure-docker "$registry" --quiet; fi
step docker pull "$image"
# Root and privileged: the TPU's device files belong to root, and this machine serves nothing else.
step docker run --detach --name=infmae --init --privileged --user=root --network=host --shm-size=16g \
  --ulimit=memlock=-1 --stop-timeout=120 --log-opt=max-size=50m --log-opt=max-file=3 \
  --env=INFMAE_JOB_SECRET --volume=/var/cache/infmae:/cache "--volume=$folder:$folder" \
  "$image" launch/restart.sh -- python -m infmae_jax.pretrain --config.distributed.method=tpu \
  "--config.distributed.notice_url=$metadata/preempted?wait_for_change=true" "${arguments[@]}"
