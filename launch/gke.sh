#!/usr/bin/env bash
# Submits a pretraining job to a GKE cluster with JobSet: all hosts start together, and start again together when one
# is lost. launch/jobset.yaml is what it submits.
#
#   launch/gke.sh --target=gpu|tpu --accelerator=A --hosts=N --chips_per_host=N --capacity=spot|on_demand \
#       --claim=C --image=I [OPTIONS] -- --config=FILE.py --workdir=/mnt/infmae/RUN [--config.key=value ...]
#
#   --target=gpu|tpu
#   --accelerator=A      the nodes' label: gke-accelerator, for example nvidia-h100-80gb, or gke-tpu-accelerator, for
#                        example tpu-v5-lite-podslice
#   --topology=T         TPU only: the nodes' label gke-tpu-topology, for example 4x4
#   --hosts=N            Pods: nodes, or hosts of one TPU slice (topology's chips / chips_per_host)
#   --chips_per_host=N   GPUs or TPU chips of one node
#   --slices=N           TPU only: slices of this topology, joined by the data centre network (1)
#   --capacity=spot|on_demand   cheap nodes that can be taken away, or not
#   --claim=C            PersistentVolumeClaim, ReadWriteMany, seen by all Pods as /mnt/infmae: runs and shards
#   --image=IMAGE        made by launch/image.sh, in a registry the nodes may read
#   --name=NAME          of the JobSet (infmae)
#   --namespace=NS --context=CONTEXT     (default; kubectl's current context)
#   --service_account=S  Kubernetes service account of the Pods (default)
#   --cpu=N --memory=M   requested on each host (8, 32Gi)
#   --grace_seconds=N    from SIGTERM to SIGKILL; nodes taken away allow about 25 s (120)
#   --restarts=N         of the whole JobSet, preemptions included; then it fails (100)
#   --dry-run            print the command with the manifest and do nothing
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launch/steps.sh"

target='' accelerator='' topology='' hosts='' chips_per_host='' slices=1 capacity='' claim='' image=''
name=infmae namespace=default context='' service_account=default cpu=8 memory=32Gi grace_seconds=120 restarts=100
parse_options "target= accelerator= topology= hosts= chips_per_host= slices= capacity= claim= image= name=
  namespace= context= service_account= cpu= memory= grace_seconds= restarts=" "$@"

check_options() {
  local option
  need accelerator hosts chips_per_host claim
  need_number hosts chips_per_host slices cpu grace_seconds restarts
  need_choice target gpu tpu
  need_choice capacity spot on_demand
  need image
  need_pinned_image "$image"
  need_shared_workdir --claim
  for option in name namespace accelerator claim service_account; do
    if [[ ! ${!option} =~ ^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$ ]]; then
      fail "--$option must be lower-case letters, digits, - and ., got ${!option}"
    fi
  done
  if [[ ! $memory =~ ^[0-9]+[GMT]i$ ]]; then fail "--memory must look like 32Gi, got $memory"; fi
  case $target in
    tpu) if [[ ! $topology =~ ^[0-9]+(x[0-9]+){1,2}$ ]]; then fail "TPUs need --topology=4x4 or the like"; fi ;;
    gpu) if [ "$slices" -ne 1 ] || [ -n "$topology" ]; then fail "--slices and --topology are for TPUs"; fi ;;
  esac
}

# The words as a JSON list, which YAML reads too. Kubernetes reads $$ as $; a single $ could begin one of its variables.
json_list() {
  local word separator=''
  printf '['
  for word in "$@"; do
    word=${word//\\/\\\\} word=${word//\"/\\\"} word=${word//$'\n'/\\n} word=${word//$'\t'/\\t}
    if [[ $word == *[[:cntrl:]]* ]]; then fail "an argument after -- holds a control character: ${word@Q}"; fi
    printf '%s"%s"' "$separator" "${word//\$/\$\$}"
    separator=', '
  done
  printf ']'
}

# render FILE: the file with each ${NAME} replaced by values[NAME]; comment lines are left out.
render() {
  local text output='' placeholder
  text=$(grep -v '^#' "$1")
  while [[ $text =~ \$\{([A-Z_]+)\} ]]; do
    placeholder=${BASH_REMATCH[0]}
    if [ -z "${values[${BASH_REMATCH[1]}]+set}" ]; then fail "$1: $placeholder has no value"; fi
    output+=${text%%"$placeholder"*}${values[${BASH_REMATCH[1]}]}
    text=${text#*"$placeholder"}
  done
  printf '%s' "$output$text"
}

check_options
secret=$(job_secret)
declare -A values=(
  [NAME]=$name [NAMESPACE]=$namespace [RESTARTS]=$restarts [SLICES]=$slices [HOSTS]=$hosts [CLAIM]=$claim
  [CHIPS_PER_HOST]=$chips_per_host [SERVICE_ACCOUNT]=$service_account [GRACE_SECONDS]=$grace_seconds
  [CPU]=$cpu [MEMORY]=$memory [IMAGE]="\"$image\"" [SECRET]="\"$secret\""
  [RESTART_CODES]="[$(IFS=, && echo "${restart_codes[*]}")]"
)
if [ "$target" = tpu ]; then
  selector="cloud.google.com/gke-tpu-accelerator: $accelerator, cloud.google.com/gke-tpu-topology: $topology"
  values[RESOURCE]=google.com/tpu
  # A slice is a node pool: no two Jobs may share one.
  values[ANNOTATIONS]='{alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}'
  # Root: the TPU's device files belong to it. Not privileged: GKE 1.28 and newer hand the devices to the Pod.
  values[POD_SECURITY]='{runAsUser: 0, seccompProfile: {type: RuntimeDefault}}'
  values[CONTAINER_SECURITY]='{allowPrivilegeEscalation: false}'
  values[ARGUMENTS]=$(json_list --config.distributed.method=tpu "${arguments[@]}")
else
  selector="cloud.google.com/gke-accelerator: $accelerator"
  values[RESOURCE]=nvidia.com/gpu
  values[ANNOTATIONS]='{}'
  values[POD_SECURITY]='{runAsNonRoot: true, runAsUser: 1000, fsGroup: 1000, '
  values[POD_SECURITY]+='fsGroupChangePolicy: OnRootMismatch, seccompProfile: {type: RuntimeDefault}}'
  values[CONTAINER_SECURITY]='{allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}'
  # JobSet names Pods NAME-JOB-JOBINDEX-PODINDEX in the domain NAME; the Pod's index is in its environment.
  distributed=(--config.distributed.method=addresses "--config.distributed.coordinator=$name-workers-0-0.$name:8476"
    "--config.distributed.num_processes=$hosts")
  if [ "$hosts" -eq 1 ]; then distributed=(--config.distributed.method=none); fi
  own=$(json_list "${distributed[@]}" "${arguments[@]}")
  if [ "$hosts" -gt 1 ]; then own="[\"--config.distributed.process_id=\$(JOB_COMPLETION_INDEX)\", ${own#[}"; fi
  values[ARGUMENTS]=$own
fi
tolerations="{key: ${values[RESOURCE]}, operator: Exists, effect: NoSchedule}"
if [ "$capacity" = spot ]; then
  selector+=', cloud.google.com/gke-spot: "true"'
  tolerations+=', {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}'
fi
values[NODE_SELECTOR]="{$selector}"
values[TOLERATIONS]="[$tolerations]"

manifest=$(render "$launch/jobset.yaml")
kubectl=(kubectl "--namespace=$namespace")
if [ -n "$context" ]; then kubectl+=("--context=$context"); fi
# Not apply: on a JobSet that is there, running or failed, it would change nothing and look as if it had.
step_with_input "$manifest" "${kubectl[@]}" create --filename=-
