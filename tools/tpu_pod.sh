#!/usr/bin/env bash
# Runs grpo.launch on a Cloud TPU pod slice, every worker with the same flags. See docs/pods.md.
#
#   tools/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [--FLAG=VALUE ...] [-- FLAGS OF grpo.launch]
#
#   up        create, wait, install, launch, logs
#   create    asks for the slice as a queued resource
#   wait      returns once the slice is there
#   install   copies this working tree to every worker and installs it with its requirements
#   launch    python -m grpo.launch --workdir=... and what follows `--`, on every worker
#   logs      follows the log of --worker; Ctrl-C leaves the run alone
#   status    of the request, and of the run on every worker
#   resume    to be given the flags of `up`: makes a preempted slice anew, and goes on with the run
#             wherever it is not going on. Exits with 3 if the run has ended well, 4 if it failed
#   stop      SIGTERM: the run saves and leaves; the slice stays, and costs
#   delete    deletes the request and the slice
#
#   --name=NAME          of the request and of the slice
#   --zone=ZONE          such as us-west4-a
#   --project=PROJECT    default: that of gcloud's configuration
#   --accelerator=TYPE   such as v5litepod-16 (16 chips), v5p-128 (64 chips), v6e-64 (64 chips)
#   --runtime=VERSION    software of the machines; default: the one for the accelerator
#   --spot               cheaper, and may be taken away at any time
#   --workdir=DIR        of the run, seen by all workers: gs://BUCKET/FOLDER, or a mounted /FOLDER
#   --worker=0           whose log
#   --python=3.11        of the environment on the workers
#   --extras=tpu,gcs     of this package
#   --setup=COMMAND      shell command on every worker after installing, in the code's folder
#   --create_flag=FLAG   one more flag for `queued-resources create`; may be repeated
#   --ssh_flag=FLAG      one more flag for `tpu-vm ssh` and `tpu-vm scp`; may be repeated
#   --alpha              uses `gcloud alpha`, which --ssh_flag=--tunnel-through-iap needs
#   --watch_s=SECONDS    resume: looks again after so long, until the run has ended
#   --dry_run            prints the commands instead of running them
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' tools/tpu_pod.sh
}

fail() { # MESSAGE [EXIT CODE]
  echo "tpu_pod.sh: $1" >&2
  exit "${2:-2}"
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) \
  || fail "bash 4.4 or newer is needed, this is $BASH_VERSION (macOS: brew install bash)"

command=${1:-}
shift || true
given=("$@")
name="" zone="" project="" accelerator="" runtime="" workdir="" setup="" watch_s=""
worker=0 python=3.11 extras=tpu,gcs spot=false dry_run=false
create_flags=() ssh_flags=() launch_flags=() tpus=(gcloud compute tpus)
while (($#)); do
  value=${1#*=}
  case $1 in
    --name=*) name=$value ;;
    --zone=*) zone=$value ;;
    --project=*) project=$value ;;
    --accelerator=*) accelerator=$value ;;
    --runtime=*) runtime=$value ;;
    --spot) spot=true ;;
    --workdir=*) workdir=$value ;;
    --worker=*) worker=$value ;;
    --python=*) python=$value ;;
    --extras=*) extras=$value ;;
    --setup=*) setup=$value ;;
    --create_flag=*) create_flags+=("$value") ;;
    --ssh_flag=*) ssh_flags+=("$value") ;;
    --alpha) tpus=(gcloud alpha compute tpus) ;;
    --watch_s=*) watch_s=$value ;;
    --dry_run) dry_run=true ;;
    -h | --help) command=help ;;
    --) shift && launch_flags=("$@") && break ;;
    *) fail "unknown argument $1; flags of grpo.launch follow a --; see tools/tpu_pod.sh --help" ;;
  esac
  shift
done

# Words as they can be typed into a shell, here or on a worker.
shell_words() {
  local word line=""
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  echo "${line:1}"
}

run() {
  if $dry_run; then
    shell_words "$@"
  else
    echo "+ $(shell_words "$@")" >&2
    "$@" || fail "that command failed ($?)" 1
  fi
}

check_where() {
  [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] \
    || fail "--name='$name' must be lower-case letters, digits and hyphens, a letter first"
  [[ -n $zone ]] || fail "--zone is missing"
  where=("--zone=$zone")
  [[ -z $project ]] || where+=("--project=$project")
  # `list` rather than `describe`: where there is no such request it succeeds and prints nothing,
  # so that its failures are failures.
  look=("${tpus[@]}" queued-resources list "${where[@]}" "--filter=name~/$name\$"
    "--format=value(state.state)")
}

check_create() {
  [[ -n $accelerator ]] || fail "--accelerator is missing, such as v5litepod-16"
  [[ -n $runtime ]] || case $accelerator in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v[234]-*) runtime=tpu-ubuntu2204-base ;;
    *) fail "which software does $accelerator need? Say so with --runtime=VERSION" ;;
  esac
}

check_launch() {
  [[ $workdir == gs://?*/?* || $workdir == /?* ]] \
    || fail "--workdir='$workdir' must be gs://BUCKET/FOLDER or /FOLDER that all workers mount"
  [[ " ${launch_flags[*]}" == *" --config="* ]] \
    || fail "nothing to launch: end with -- --config=experiments/x.py and other flags of grpo.launch"
  [[ " ${launch_flags[*]}" != *" --workdir"* ]] || fail "--workdir goes before the --"
}

on_worker() { # WORKER COMMAND
  run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" "${ssh_flags[@]}" "--worker=$1" "--command=$2"
}

create() {
  local flags=("--node-id=$name" "${where[@]}"
    "--accelerator-type=$accelerator" "--runtime-version=$runtime")
  ! $spot || flags+=(--spot)
  run "${tpus[@]}" queued-resources create "$name" "${flags[@]}" "${create_flags[@]}"
}

delete() {
  run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
}

wait_for_slice() {
  local state before=""
  if $dry_run; then
    run "${look[@]}"
    return
  fi
  while true; do
    state=$("${look[@]}")
    [[ $state == "$before" ]] || echo "$(date +%T) $name: ${state:-there is no such request}" >&2
    case $state in
      ACTIVE) return ;;
      "" | FAILED | SUSPENDING | SUSPENDED | DELETING)
        fail "$name will not come (${state:-not asked for}); \`status\` says more, \`resume\` asks anew" 1
        ;;
    esac
    before=$state
    sleep 30
  done
}

# The commit and, over it, the working tree with its edits and new files: what is tried is what
# runs, and the run still records the commit, with a + if it was changed.
pack() {
  local tree file
  if $dry_run; then
    echo "# packs the commit and what the working tree changes into build/grpo.tar.gz"
    return
  fi
  git rev-parse --verify --quiet HEAD >/dev/null || fail "$PWD is not a git checkout with a commit"
  tree=$(mktemp -d)
  git clone --quiet --no-checkout --depth=1 "file://$PWD" "$tree"
  git ls-files -z --cached --others --exclude-standard \
    | while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done \
    | tar --null --files-from=- -cf - | tar -xf - -C "$tree"
  git -C "$tree" reset --quiet
  mkdir -p build
  tar -czf build/grpo.tar.gz -C "$tree" .
  rm -rf "$tree"
}

# The new code is unpacked beside the old one, which a run may still need.
install() {
  local steps=(
    "rm -rf grpo_new"
    "mkdir grpo_new"
    "tar -xzf grpo.tar.gz -C grpo_new"
    "bash grpo_new/tools/tpu_worker.sh idle"
    "rm -rf grpo_code"
    "mv grpo_new grpo_code"
    "bash grpo_code/tools/tpu_worker.sh install $(shell_words "$python" "$extras")"
  )
  local all
  all=$(printf ' && %s' "${steps[@]}")
  pack
  run "${tpus[@]}" tpu-vm scp build/grpo.tar.gz "$name:" "${where[@]}" "${ssh_flags[@]}" --worker=all
  on_worker all "${all:4}"
  [[ -z $setup ]] || on_worker all "cd grpo_code && $setup"
}

launch() {
  local flags
  flags=$(shell_words "--workdir=$workdir" "${launch_flags[@]}")
  on_worker all "bash grpo_code/tools/tpu_worker.sh launch $flags"
}

stop() {
  on_worker all "bash grpo_code/tools/tpu_worker.sh stop"
}

logs() {
  on_worker "$worker" "bash grpo_code/tools/tpu_worker.sh logs"
}

# One line a worker.
status_of_run() {
  # shellcheck disable=SC2016 # expanded on the worker
  on_worker all 'bash grpo_code/tools/tpu_worker.sh status || echo "$(hostname): not installed"'
}

status() {
  run "${tpus[@]}" queued-resources describe "$name" "${where[@]}"
  if $dry_run || [[ $("${look[@]}") == ACTIVE ]]; then status_of_run; fi
}

make_slice() {
  create
  wait_for_slice
  install
}

# Launches again a run that was stopped (143), was killed (137), lost its peers (134) or vanished
# with its machine; it goes on from its newest checkpoint.
resume() {
  local state runs
  if $dry_run; then
    run "${look[@]}"
    echo "# where that printed SUSPENDED:"
    state=SUSPENDED
  else
    state=$("${look[@]}")
  fi
  while [[ $state == SUSPENDING || $state == DELETING ]]; do
    sleep 30
    state=$("${look[@]}")
  done
  case $state in
    ACTIVE)
      runs=$(status_of_run)
      echo "$runs"
      if ! grep -qv ": ended (exit code 0)" <<<"$runs"; then
        fail "the run has ended; nothing to resume" 3
      elif ! grep -qv ": running" <<<"$runs"; then
        return
      elif grep ": ended" <<<"$runs" | grep -qvE "exit code (0|134|137|143)\)"; then
        fail "the run failed by itself; see \`logs\`. \`launch\` starts it again" 4
      fi
      if grep -q ": not installed" <<<"$runs"; then install; else stop; fi
      ;;
    FAILED | SUSPENDED)
      delete
      make_slice
      ;;
    "") make_slice ;;
    *)
      wait_for_slice
      install
      ;;
  esac
  launch
}

# Each round is a process of its own, so that one that fails, as when a slice vanishes under it,
# does not end the watch.
watch_run() {
  local status flag flags=()
  for flag; do
    [[ $flag == --watch_s=* ]] || flags+=("$flag")
  done
  while true; do
    status=0
    "$BASH" tools/tpu_pod.sh resume "${flags[@]}" || status=$?
    case $status in
      3) return ;;
      2 | 4) exit "$status" ;;
    esac
    sleep "$watch_s"
  done
}

case $command in
  help | -h | --help) usage && exit ;;
  up | resume) check_where && check_create && check_launch ;;
  create) check_where && check_create ;;
  launch) check_where && check_launch ;;
  wait | install | logs | status | stop | delete) check_where ;;
  *) fail "unknown command '$command'; see tools/tpu_pod.sh --help" ;;
esac
case $command in
  up)
    make_slice
    launch
    logs
    ;;
  wait) wait_for_slice ;;
  resume)
    if [[ -n $watch_s ]]; then watch_run "${given[@]}"; else resume; fi
    ;;
  *) "$command" ;;
esac
