#!/usr/bin/env bash
# Runs a command again while it ends for a reason that a restart cures.
#
#   launch/restart.sh [OPTIONS] -- COMMAND...
#
# Restarted: exit codes 75 (preempted and saved), 76 (another process of the job lost) and deaths by SIGABRT, SIGKILL,
# SIGSEGV and SIGTERM (134, 137, 139, 143). Everything else ends it with the command's exit code: 0 done, 1 unexpected,
# 2 something for you to fix, 3 numbers diverged, 130 Ctrl-C.
#
# SIGTERM and SIGINT are passed on to the command, which is waited for and not started again. Between two runs, SIGTERM
# ends with 75 and SIGINT with 130, as the command itself would.
#
#   --times=N            restarts within the window, then give up with the last exit code (10)
#   --within=SECONDS     the window (3600)
#   --pause=SECONDS      between two runs (30, which outlasts a spot machine that is being taken away)
#   --raise_final        exit codes 1, 2, 3 become 241, 242, 243: for launchers that report the highest of many
#   --dry-run            print the command and do nothing
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

times=10 within=3600 pause=30 raise_final=
parse_options "times= within= pause= raise_final" "$@"
need_number times within pause
if [ "${#arguments[@]}" -eq 0 ]; then fail "no command after --; see $0 --help"; fi
if [ -n "$dry_run" ]; then
  quote "${arguments[@]}"
  exit 0
fi

signal='' child='' interrupted=''

# on_signal NAME: remembers it, and passes it on when there is a command to pass it to.
on_signal() {
  signal=$1 interrupted=true
  if [ -n "$child" ]; then kill "-$1" "$child" 2>/dev/null || true; fi
}
trap 'on_signal TERM' TERM
trap 'on_signal INT' INT

# Runs the command, sets `code`. Its own process group: Ctrl-C on a terminal would otherwise reach it twice, by the
# terminal and from here, and twice means "quit without saving".
run_command() {
  local status
  set -m
  "${arguments[@]}" </dev/null &
  child=$!
  set +m
  if [ -n "$signal" ]; then kill "-$signal" "$child" 2>/dev/null || true; fi
  code=127
  while :; do
    interrupted='' status=0
    wait "$child" || status=$?
    if [ "$status" -ne 127 ]; then code=$status; fi # 127: it has ended, and its status is known already
    if [ -z "$interrupted" ]; then break; fi # a signal ends `wait` early, with a status that is not the command's
  done
  child=
}

finish() {
  if [ -n "$raise_final" ]; then exit "$(raise_final_code "$1")"; fi
  exit "$1"
}

starts=()
while :; do
  case $signal in TERM) finish 75 ;; INT) finish 130 ;; esac
  run_command
  if [ -n "$signal" ] || ! may_restart "$code"; then finish "$code"; fi
  recent=()
  for start in "${starts[@]}"; do
    if [ $((SECONDS - start)) -lt "$within" ]; then recent+=("$start"); fi
  done
  starts=("${recent[@]}" "$SECONDS")
  if [ "${#starts[@]}" -gt "$times" ]; then
    if [ "$times" -gt 0 ]; then
      echo "error: gave up after $times restarts within $within s; the last exit code is $code" >&2
    fi
    finish "$code"
  fi
  echo "restart ${#starts[@]} of at most $times within $within s: exit code $code; next run in $pause s" >&2
  sleep "$pause" &
  wait $! || kill $! 2>/dev/null || true
done
