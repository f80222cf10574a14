#!/usr/bin/env bash
# Runs one command on every worker of a Cloud TPU slice, and again on a new slice when that one is preempted.
#
#   launch/tpu_vm.sh --name=mine --zone=us-west4-a --type=v5litepod-16 --spot --queued --env=HF_TOKEN -- \
#     python -m jaxpost.train --config=configs/sft.py --workdir=gs://BUCKET/mine --distributed
#
#   --name=NAME         the slice: used if it is there, made if it is not (and so is the queued resource)
#   --zone=ZONE         where it is
#   --type=TYPE         accelerator type: v5litepod-8, v6e-16, v4-32, ...
#   --project=PROJECT   default: the one gcloud is configured for
#   --version=IMAGE     runtime image; default: the usual one of the type
#   --network=NETWORK   default: the project's default network
#   --spot              cheaper, and may be preempted
#   --queued            ask through a queued resource and wait for it, instead of failing where there is no capacity
#   --env=A,B           environment variables to pass on by name; their values are shown nowhere
#   --retries=N         how often to begin again after losing the slice (default 10)
#   --poll=SECONDS      between looks at the slice's state (default 30)
#   --dry-run           print every command in order and run none
#
# The tree around this script (what git tracks, and new files that it does not ignore) goes to ~/jaxpost on every worker and is
# installed there with [tpu,gcs]; the command runs in it. Everything else is in ~/.jaxpost. The slice stays when the command has
# ended, and costs until it is deleted. Exits with the command's status; 2 where the options are wrong.

set -euo pipefail
{ set +x; } 2>/dev/null # a trace would show the values of --env

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $1" && exit "${2:-2}"; }

# ------------------------------------------------------------------------------------------------------------ Options

name='' zone='' type='' project='' version='' network='' spot='' queued='' env='' retries=10 poll=30 dry=''
while (($#)); do
  case $1 in
    --spot) spot=1 ;;
    --queued) queued=1 ;;
    --dry-run) dry=1 ;;
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 0 ;;
    --) shift && break ;;
    --name=* | --zone=* | --type=* | --project=* | --version=* | --network=* | --env=* | --retries=* | --poll=*)
      option=${1%%=*} && printf -v "${option#--}" '%s' "${1#*=}" ;;
    --name | --zone | --type | --project | --version | --network | --env | --retries | --poll)
      (($# > 1)) || die "$1 needs a value; see --help"
      printf -v "${1#--}" '%s' "$2" && shift ;;
    *) die "unknown option ${1%%=*}; see --help (the command comes after --)" ;;
  esac
  shift
done
for option in name zone type; do [[ ${!option} ]] || die "--$option=... is required; see --help"; done
(($#)) || die "no command; give one after --"
[[ $retries =~ ^[0-9]+$ ]] || die "--retries=$retries is no number"
[[ $poll =~ ^[0-9]+$ ]] || die "--poll=$poll is no number of seconds"

IFS=, read -ra variables <<<"$env"
for variable in ${variables[@]+"${variables[@]}"}; do
  [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || die "--env takes names alone, such as --env=HF_TOKEN,WANDB_API_KEY"
  [[ ${!variable:-} ]] || die "--env=$variable: there is no such variable here, or it is empty"
  case $variable in # what is no secret, such as a project's name, may well be part of the command
    *TOKEN* | *KEY* | *SECRET* | *PASSWORD*)
      [[ "$*" != *"${!variable}"* ]] || die "the command holds the value of $variable, which belongs in no command" ;;
  esac
done

if [[ ! $version ]]; then
  case $type in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi

# In every generation a worker has up to 8 of what the type counts (cores up to v5p, chips in v5e and v6e).
if [[ ${type##*-} =~ ^[0-9]+$ ]] && ((${type##*-} > 8)) && [[ "$*" == *jaxpost.train* && "$*" != *--distributed* ]]; then
  say "note: $type has several workers; jaxpost.train needs --distributed to find them"
fi
[[ ! $spot || "$*" == *gs://* ]] || say "note: nothing in the command is on gs://; what it writes is lost with the slice"

# ----------------------------------------------------------------------------------------------------------- Commands

quoted() {
  local word escaped="'\\''"
  for word; do
    case $word in '' | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//\'/$escaped}'" ;; esac
    printf '%s ' "$word"
  done
}

run() { # prints a command, whole in a dry run and by its first line otherwise, and runs it
  local line
  line=$(quoted "$@")
  if [[ $dry ]]; then
    printf '%s\n' "${line% }"
  else
    say "+ ${line%%$'\n'*}"
    "$@"
  fi
}

where=(--zone="$zone" ${project:+--project="$project"} --quiet)
tpu() { run gcloud compute tpus "$@" "${where[@]}"; }
copy() { tpu tpu-vm scp "$1" "$name:.jaxpost/$2" --worker=all; }
# A worker that is gone without a word must not keep ssh waiting.
everywhere() {
  tpu tpu-vm ssh "$name" --worker=all --command="$1" --ssh-flag=-oConnectTimeout=20 \
    --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=8
}

state='' queue=ABSENT imagined=ABSENT # a dry run imagines that there is no slice, and that what it asks for comes about
look() { # look tpu-vm|queued-resources FIELD: puts the state of the slice, or of the request for it, in $state
  local try
  if [[ $dry ]]; then
    tpu "$1" describe "$name" --format="value($2)"
    state=$imagined
    return
  fi
  for try in 1 2 3; do
    ((try == 1)) || sleep "$poll"
    if state=$(gcloud compute tpus "$1" describe "$name" --format="value($2)" "${where[@]}" 2>"$scratch/stderr"); then
      return 0
    elif grep -q NOT_FOUND "$scratch/stderr"; then
      state=ABSENT && return 0
    fi
  done
  say "error: no answer about $name: $(cat "$scratch/stderr")" && return 1
}

# -------------------------------------------------------------------------------------------------------------- Slice

create() {
  local options=(--accelerator-type="$type" ${network:+--network="$network"} ${spot:+--spot})
  if [[ $queued ]]; then
    tpu queued-resources create "$name" --node-id="$name" --runtime-version="$version" "${options[@]}" || return
    imagined=ACTIVE
  else
    tpu tpu-vm create "$name" --version="$version" "${options[@]}" || return
    imagined=READY
  fi
}

delete() { # by the request that it came by, if any
  if [[ $queue == ABSENT ]]; then tpu tpu-vm delete "$name"; else tpu queued-resources delete "$name" --force; fi
}

bring_up() { # returns when the slice is ready; with an error where what it asked for was refused, or lost before it was there
  local made='' shown=''
  while :; do
    if [[ $queued ]]; then
      look queued-resources state.state || return
      queue=$state
      [[ $queue != ACTIVE ]] || imagined=READY
    fi
    look tpu-vm state || return
    [[ $dry || $queue/$state == "$shown" ]] || say "$name: ${queued:+request $queue, }slice $state"
    shown=$queue/$state
    case $queue/$state in
      ABSENT/READY | ACTIVE/READY) return ;;
      SUSPENDING/* | DELETING/* | */DELETING) sleep "$poll" ;;
      SUSPENDED/* | FAILED/* | */PREEMPTED | */TERMINATED)
        [[ ! $made ]] || return 1
        delete || return ;;
      ABSENT/STOPPED) tpu tpu-vm start "$name" || return ;;
      ABSENT/ABSENT)
        [[ ! $made ]] || return 1
        create || return
        made=1 ;;
      *) sleep "$poll" ;;
    esac
  done
}

# ------------------------------------------------------------------------------------------------------------ Workers

# uv brings Python where the image's is too old, rather than apt: it needs no root, knows no release of the system, and does not
# wait for the lock that a fresh machine's own updates hold. All of it can be done again from the start, since gcloud repeats a
# command whose connection broke.
install() {
  cat <<'REMOTE'
set -euo pipefail
cd ~/.jaxpost
if [ -f synced.tgz ]; then tar --quoting-style=literal -tzf synced.tgz | (cd ~/jaxpost && xargs -d "\n" rm -f --); fi
tar -C ~/jaxpost -xzf tree.tgz
cp tree.tgz synced.tgz
if [ ! -x venv/bin/pip ]; then
  if python3 -c "import sys, ensurepip; sys.exit(sys.version_info < (3, 11))"; then
    python3 -m venv venv
  else
    curl -LsSf https://astral.sh/uv/0.13.5/install.sh | UV_INSTALL_DIR=$HOME/.jaxpost/bin UV_NO_MODIFY_PATH=1 sh
    bin/uv venv --seed --python 3.12 venv
  fi
fi
venv/bin/pip install -q -e "$HOME/jaxpost[tpu,gcs]"
REMOTE
}

# Starts the command (the function given, as $id) apart from this connection, or finds it started, and follows its log. gcloud
# repeats a command whose connection broke, and must not start a second training beside the first. A machine that goes down asks
# the training to save and end, which then ends well: that is reported as 143, or the launcher would take it for finished.
follow() {
  cat <<'REMOTE'
cd ~/.jaxpost
run=runs/$id lines=20
mkdir -p runs
if mkdir "$run" 2>/dev/null; then
  exec 9>lock
  flock -n 9 || { rmdir "$run"; echo "another command still runs on $HOSTNAME" >&2; exit 75; }
  : >"$run/log"
  set -m
  (
    trap "asked=143" TERM
    if [ -f tokens ]; then . ./tokens; rm tokens; fi
    export PATH="$HOME/.jaxpost/venv/bin:$PATH" PYTHONUNBUFFERED=1
    cd ~/jaxpost && given
    ended=$?
    echo "${asked:-$ended}" >~/.jaxpost/"$run/status"
  ) </dev/null >"$run/log" 2>&1 &
  echo $! >"$run/pid"
  set +m
  exec 9>&-
  lines=+1
fi
for _ in $(seq 50); do [ ! -s "$run/pid" ] || break; sleep 0.2; done
tail -s 0.2 -n "$lines" -f --pid="$(cat "$run/pid")" "$run/log" | sed -u "s/^/[${HOSTNAME##*-}] /"
exit "$(cat "$run/status" 2>/dev/null || echo 137)"
REMOTE
}

secrets() { # the values of --env go by a file that only its owner reads, never by a command line
  ((${#variables[@]})) || return 0
  if [[ $dry ]]; then
    echo "# ${variables[*]}: to $scratch/tokens, mode 0600"
  else
    (
      umask 077
      for variable in "${variables[@]}"; do printf 'export %s=%q\n' "$variable" "${!variable}"; done >"$scratch/tokens"
    )
  fi
  copy "$scratch/tokens" tokens && run rm "$scratch/tokens"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pack() { # what git tracks may be gone from the disk
  cat <<'LOCAL'
cd "$1"
git ls-files -z --cached --others --exclude-standard |
  while IFS= read -r -d "" file; do [ ! -e "$file" ] || printf "%s\0" "$file"; done |
  COPYFILE_DISABLE=1 tar --null -T - -czf "$2"
LOCAL
}

attempt() {
  everywhere 'mkdir -p -m 700 ~/.jaxpost ~/jaxpost' &&
    run bash -euo pipefail -c "$(pack)" pack "$root" "$scratch/tree.tgz" && copy "$scratch/tree.tgz" tree.tgz &&
    everywhere "$(install)" && secrets || return
  trap 'unwatched; exit 130' INT
  everywhere "id=$id; given() { $given; }"$'\n'"$(follow)"
}

unwatched() {
  say "no longer watching $name, where the command goes on if it was begun. To stop it, so that it saves first:"
  dry=1 everywhere "kill -- -\$(cat ~/.jaxpost/runs/$id/pid)" >&2
}

lost() { # whether the slice went away under the command; its state may follow a little later
  local try looks=1
  [[ ! $spot || $1 == 2 ]] || looks=3
  for ((try = 1; try <= looks; try++)); do
    ((try == 1)) || sleep "$poll"
    look tpu-vm state || return
    [[ $state == READY ]] || return 0
  done
  return 1
}

# --------------------------------------------------------------------------------------------------------------- Main

given=$(quoted "$@") given=${given% }
scratch=${TMPDIR:-/tmp}/jaxpost-launch started=$(date +%Y%m%d-%H%M%S)-$$ status=1
if [[ ! $dry ]]; then
  command -v gcloud >/dev/null || die "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
fi

for ((tries = 0; tries <= retries; tries++)); do
  id=$started-$tries
  if bring_up; then
    attempt && break
    status=$?
    trap - INT
    if ! lost "$status"; then
      ((status != 255)) || unwatched # the slice is there, and cannot be reached
      exit "$status"
    fi
    say "lost $name (it is $state); beginning again"
  elif ((tries == 0)); then
    die "could not get $name; --queued waits for capacity" 1
  else
    sleep "$poll"
  fi
done
((tries <= retries)) || die "giving up on $name after $tries attempts" "$status"

if [[ $dry ]]; then echo "# where the slice is lost, up to $retries times: the following, and all of the above again"; fi
[[ $dry ]] || say "done. $name is still there, and costs; to delete it:"
dry=1 delete | sed 's/^/# /' >&"${dry:-2}"
