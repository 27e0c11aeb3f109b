# What the launch scripts share: options, one-line errors, --help, --dry-run, and which exit codes mean "start again".
# Sourced, not run.
# shellcheck disable=SC2034 # the variables are for the scripts that source this

if [ "${BASH_VERSINFO[0]}" -lt 5 ]; then
  echo "error: bash 5 or newer is needed, this is ${BASH_VERSION}" >&2
  exit 2
fi

# Preempted and saved (75), another process of the job lost (76), killed by SIGABRT, SIGKILL, SIGSEGV or SIGTERM.
restart_codes=(75 76 134 137 139 143)
dry_run=''
arguments=()

fail() {
  echo "error: $*" >&2
  exit 2
}

may_restart() {
  local code
  for code in "${restart_codes[@]}"; do
    if [ "$1" -eq "$code" ]; then return 0; fi
  done
  return 1
}

# Slurm reports the highest exit code of a step, so one that forbids a restart (1, 2, 3) must outbid all that allow it.
raise_final_code() {
  case $1 in 1 | 2 | 3) echo $((240 + $1)) ;; *) echo "$1" ;; esac
}

lower_final_code() {
  case $1 in 241 | 242 | 243) echo $(($1 - 240)) ;; *) echo "$1" ;; esac
}

# parse_options "NAME= SWITCH ..." "$@": --NAME=VALUE sets the variable NAME, --SWITCH sets it to true (- and _ are
# alike); `arguments` takes what follows --. --help prints the comment at the top of the script. Here and below, names
# with _ in front keep clear of the options' own.
parse_options() {
  local _known=" ${1//$'\n'/ } dry_run " _word _option
  shift
  while [ $# -gt 0 ]; do
    _word=$1
    shift
    case $_word in
      --)
        arguments=("$@")
        return
        ;;
      --help)
        sed -n '2,/^[^#]/ { /^#/ s/^# \{0,1\}//p }' "$0"
        exit 0
        ;;
      --*) ;;
      *) fail "unexpected argument $_word; what is passed on comes after --, see $0 --help" ;;
    esac
    _option=${_word#--}
    _option=${_option%%=*}
    _option=${_option//-/_}
    if [[ $_known == *" $_option= "* ]]; then
      if [[ $_word != *=?* ]]; then fail "--$_option needs a value: --$_option=..."; fi
      printf -v "$_option" %s "${_word#*=}"
    elif [[ $_known == *" $_option "* ]]; then
      if [[ $_word == *=* ]]; then fail "--$_option takes no value"; fi
      printf -v "$_option" %s true
    else
      fail "unknown option --$_option; see $0 --help"
    fi
  done
}

# need NAME...: these options must have been given.
need() {
  local _option
  for _option in "$@"; do
    if [ -z "${!_option}" ]; then fail "--$_option=... is needed; see $0 --help"; fi
  done
}

# need_number NAME...: these options must be whole numbers.
need_number() {
  local _option
  for _option in "$@"; do
    if [[ ! ${!_option} =~ ^[0-9]+$ ]]; then fail "--$_option must be a whole number, got ${!_option}"; fi
  done
}

# need_choice NAME VALUE...: this option must have been given, with one of these values.
need_choice() {
  local _option=$1 _values
  shift
  if [[ -n ${!_option} && " $* " == *" ${!_option} "* ]]; then return 0; fi
  printf -v _values ', %s' "$@"
  fail "--$_option must be one of ${_values#, }${!_option:+; got ${!_option}}"
}

# need_pinned_image IMAGE: it must name a tag other than "latest", or a digest.
need_pinned_image() {
  if [[ ! $1 =~ ^[A-Za-z0-9._:/@-]+$ ]]; then fail "--image must be letters, digits and . _ - : / @, got ${1@Q}"; fi
  if [[ ! ${1##*/} =~ ^[^:@]+(:[^:@]+|@sha256:[0-9a-f]{64})$ || $1 == *:latest ]]; then
    fail "--image must end in a tag other than latest (or a digest), so that a restart gets the same code; got '$1'"
  fi
}

# need_shared_workdir WHAT: the training's arguments must name a workdir in the folder that all hosts share.
need_shared_workdir() {
  local word
  for word in "${arguments[@]}"; do
    if [[ $word == --workdir=/mnt/infmae/?* ]]; then return 0; fi
  done
  fail "after --, --workdir=/mnt/infmae/... is needed: $1 is mounted there, and a run must outlive its machines"
}

# The secret by which the processes of a job know each other: the caller's, or a new one.
job_secret() {
  local _secret=${INFMAE_JOB_SECRET:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
  if [[ ! $_secret =~ ^[A-Za-z0-9._-]{16,}$ ]]; then
    fail "INFMAE_JOB_SECRET must be at least 16 letters, digits and . _ -; openssl rand -hex 32 makes one"
  fi
  echo "$_secret"
}

# The words as a command line for bash.
quote() {
  local word separator=
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then word=${word@Q}; fi
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
  echo
}

# step COMMAND...: runs it; with --dry-run prints it instead. What --dry-run prints is a bash script that does the same.
step() {
  if [ -n "$dry_run" ]; then quote "$@"; else "$@"; fi
}

# step_with_input TEXT COMMAND...: the same, with TEXT on standard input.
step_with_input() {
  local text=$1
  shift
  if [ -n "$dry_run" ]; then
    printf "%s <<'END'\n%s\nEND\n" "$(quote "$@")" "$text"
  else
    "$@" <<<"$text"
  fi
}

# last_step COMMAND...: the same, in place of this script, so that signals reach the command.
last_step() {
  if [ -n "$dry_run" ]; then quote "$@"; else exec "$@"; fi
}
