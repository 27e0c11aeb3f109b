#!/usr/bin/env bash
# Pretrains on Cloud TPU VMs: asks for a TPU slice (a queued resource), runs the training on all its workers, asks for
# another slice when this one is taken away, and deletes it when the training has ended.
#
#   launch/tpu_vm.sh run    WHERE WHAT [OPTIONS] -- --config=FILE.py --workdir=/mnt/infmae/RUN [--config.key=value ...]
#   launch/tpu_vm.sh start  WHERE --existing --image=I --mount=M -- ...     on a TPU VM that is already there
#   launch/tpu_vm.sh status|logs|stop|delete  WHERE [--existing]
#
# `run` may be interrupted: the training goes on, and the same command watches it again. `stop` saves and ends the
# training on all workers; `run` then deletes the slice; the same `run` later resumes. `logs` follows worker 0.
#
# WHERE: --project=P --zone=Z --name=NAME
# WHAT:
#   --accelerator_type=T        for example v5litepod-16
#   --runtime_version=V         of the TPU VM, for example v2-alpha-tpuv5-lite
#   --capacity=spot|on_demand|reserved   what it costs and who may take it away
#   --image=IMAGE               made by launch/image.sh --target=tpu, in a registry the TPU's service account may read
#   --mount=HOST:/SHARE | gs://BUCKET    mounted on every worker as /mnt/infmae: runs and shards (README: which to take)
#   --service_account=EMAIL     of the TPU VMs (the project's default)
#   --slices=N                  slices of this type, joined by the data centre network (1)
# OPTIONS:
#   --wait_at_most=DURATION     for a free slice; then the request fails and is made again (24h)
#   --times=N                   ask for a new slice at most N times (50)
#   --poll=SECONDS              between two looks (60)
#   --keep                      do not delete the slice at the end: it goes on costing money
#   --dry-run                   print the commands and do nothing
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launch/steps.sh"

project='' zone='' name='' accelerator_type='' runtime_version='' capacity='' image='' mount=''
secret='' service_account='' slices=1 wait_at_most=24h times=50 poll=60 keep='' existing=''
action=${1:---help}
if [ $# -gt 0 ]; then shift; fi
if [[ $action == --* ]]; then parse_options "" "$action"; fi
parse_options "project= zone= name= accelerator_type= runtime_version= capacity= image= mount=
  service_account= slices= wait_at_most= times= poll= keep existing" "$@"
need project zone name
need_number slices times poll

where=("--project=$project" "--zone=$zone")
queue=(gcloud compute tpus queued-resources)
if [ -n "$existing" ]; then
  ssh=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --quiet)
  everywhere=(--worker=all)
else
  ssh=("${queue[@]}" ssh "$name" "${where[@]}" --quiet)
  everywhere=(--node=all --worker=all)
fi

check_job() {
  need mount image
  need_pinned_image "$image"
  need_shared_workdir --mount
  case $mount in gs://?* | ?*:/?*) ;; *) fail "--mount must be HOST:/SHARE or gs://BUCKET, got $mount" ;; esac
  if [[ $mount${arguments[*]} == *'|'* ]]; then fail "neither --mount nor an argument after -- may hold a |"; fi
  secret=$(job_secret)
}

create() {
  local options=("--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version") settings
  if [ "$slices" -gt 1 ]; then
    options+=("--node-count=$slices" "--node-prefix=$name")
  else
    options+=("--node-id=$name")
  fi
  if [ "$capacity" != on_demand ]; then options+=("--$capacity"); fi
  if [ -n "$service_account" ]; then options+=("--service-account=$service_account"); fi
  settings="infmae-image=$image|infmae-mount=$mount|infmae-secret=$secret"
  settings+="|infmae-arguments=$(quote "${arguments[@]}")"
  # ^|^ makes | the separator: arguments contain commas.
  step "${queue[@]}" create "$name" "${where[@]}" "${options[@]}" "--valid-until-duration=$wait_at_most" \
    --scopes=cloud-platform "--metadata-from-file=startup-script=$launch/tpu_worker.sh" "--metadata=^|^$settings"
}

list() { step "${queue[@]}" list "${where[@]}" "--filter=name~/$name\$" '--format=value(state.state)'; }
remove() { step "${queue[@]}" delete "$name" "${where[@]}" --force --quiet; }

workers() {
  step "${ssh[@]}" "${everywhere[@]}" "--command=grep exited /run/infmae-state 2>/dev/null || \
sudo docker inspect --format={{.State.Status}}:{{.State.ExitCode}} infmae 2>/dev/null || echo starting:0"
}

last_words() { step "${ssh[@]}" "${everywhere[@]}" '--command=sudo docker logs --tail=50 infmae 2>&1'; }

# The exit code of the whole job, out of one line STATUS:CODE a worker on standard input; "running" while it has none.
outcome() {
  local line code highest=-1 running=''
  while read -r line; do
    if [[ ! $line =~ ^([a-z]+):([0-9]+)$ ]]; then continue; fi
    code=${BASH_REMATCH[2]}
    if [ "${BASH_REMATCH[1]}" != exited ]; then
      running=true
    elif [ "$code" -ne 0 ] && ! may_restart "$code"; then
      echo "$code" # the others wait for this worker in vain
      return
    elif [ "$code" -gt "$highest" ]; then
      highest=$code
    fi
  done
  if [ -n "$running" ] || [ "$highest" -lt 0 ]; then echo running; else echo "$highest"; fi
}

end_with() {
  local attempt
  echo "the training ended with exit code $1"
  if [ "$1" -ne 0 ]; then last_words >&2 || true; fi
  if [ -n "$keep" ]; then
    echo "kept, and costing money: $name; launch/tpu_vm.sh delete removes it"
    exit "$1"
  fi
  for attempt in 1 2 3 4 5; do
    if remove; then exit "$1"; fi
    sleep "$((poll * attempt))"
  done
  echo "error: $name could not be deleted and goes on costing money: delete it by hand" >&2
  exit 1
}

# request: asks for a slice. A request refused at first is a mistake in it; later on it is tried again.
request() {
  if [ "$requests" -gt "$times" ]; then fail "gave up after asking for $requests slices"; fi
  requests=$((requests + 1))
  if ! create && [ -z "$seen" ]; then fail "the request was refused, see above"; fi
}

run() {
  local state now before=running requests=0 seen=''
  while :; do
    now=running
    if ! state=$(list); then state=UNKNOWN; fi
    case $state in
      UNKNOWN) echo "could not ask for the state of $name" >&2 ;;
      '') request ;;
      SUSPENDED | FAILED)
        echo "$name is $state: deleting it, to ask for another one"
        remove || echo "could not delete it; trying again" >&2
        ;;
      ACTIVE) now=$(workers 2>/dev/null | outcome) || now=running ;; # out of reach: it may be on its way out
    esac
    # Twice the same: after a reboot, the container of before is there until the startup script has removed it.
    if [ "$now" != running ] && [ "$now" = "$before" ]; then end_with "$now"; fi
    before=$now
    if [ -n "$state" ] && [ "$state" != UNKNOWN ]; then seen=true; fi
    echo "$(date +%H:%M:%S) $name: ${state:-REQUESTED}"
    sleep "$poll"
  done
}

case $action in
  run)
    need accelerator_type runtime_version
    need_choice capacity spot on_demand reserved
    check_job
    if [ -n "$existing" ]; then fail "run makes the TPU VM; for one that is there: start --existing"; fi
    if [ -z "$dry_run" ]; then run; fi
    echo "# every $poll s:"
    list
    echo "# when there is none:"
    create
    echo "# when it is ACTIVE:"
    workers
    echo "# when it is SUSPENDED or FAILED, or the training has ended (not with --keep):"
    remove
    echo "# before that, when the training failed:"
    last_words
    ;;
  start)
    if [ -z "$existing" ]; then fail "start is for a TPU VM that is already there: add --existing"; fi
    check_job
    step gcloud compute tpus tpu-vm scp "$launch/tpu_worker.sh" "$name:tpu_worker.sh" "${where[@]}" --quiet --worker=all
    step "${ssh[@]}" "${everywhere[@]}" "--command=$(quote sudo env "INFMAE_IMAGE=$image" "INFMAE_MOUNT=$mount" \
      "INFMAE_ARGUMENTS=$(quote "${arguments[@]}")" "INFMAE_SECRET=$secret" bash tpu_worker.sh)"
    ;;
  status)
    if [ -z "$existing" ]; then list; fi
    workers
    ;;
  logs) last_step "${ssh[@]}" --worker=0 '--command=sudo docker logs --follow --tail=100 infmae' ;;
  stop) step "${ssh[@]}" "${everywhere[@]}" '--command=sudo docker stop --time=120 infmae' ;;
  delete)
    if [ -n "$existing" ]; then fail "delete removes what run made; this TPU VM was made otherwise"; fi
    remove
    ;;
  *) fail "unknown action $action; see $0 --help" ;;
esac
