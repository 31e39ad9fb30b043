#!/usr/bin/env bash
# Times this trainer, Tunix and TRL on the same GRPO steps, and prints how they compare.
#
#   tools/bench_peers.sh [WORKLOAD ...] [--FLAG=VALUE ...]
#
#   fixed     2 prompts x 8, prompt 128 tokens, 64 new ones, SmolLM2-135M's shape, random weights
#   long      the same with prompts of 512 tokens
#   natural   real weights (--model), GSM8K questions (--data) of at most 256 tokens, up to 256 new
#   Without a workload: fixed and long.
#
#   --model=DIR          Hugging Face folder of SmolLM2-135M-Instruct, in float32
#   --data=FILE          GSM8K as JSON lines
#   --trainers=A,B       which of ours,tunix,trl, and in which order; default: all
#   --ours=FLAGS         more flags of tools/bench.py for ours, for instance --remat=attn
#   --rounds=3           how often each is run; they take turns, one at a time
#   --steps=3            steps a run; the first one warms up and is not timed
#   --time_limit_s=1800  what one run may take
#   --out=DIR            records and logs; default: $PEERS_VENVS/results
#
# PEERS_VENVS (default .peers) holds the peers' environments, made here from the pinned versions of
# tools/peers/requirements-*.txt when missing. PYTHON (default .venv/bin/python, else python3) runs
# ours and makes them. A run that fails is a row of the table that says how. The table is Markdown;
# a JSON line follows it. What is measured, and how to read it: tools/peers/README.md.
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
}

fail() {
  echo "bench_peers.sh: $1" >&2
  exit 2
}

workloads=() ours=() model="" data="" trainers=ours,tunix,trl rounds=3 steps=3 time_limit_s=1800 out=""
for argument; do
  value=${argument#*=}
  case $argument in
    fixed | long | natural) workloads+=("$argument") ;;
    --model=*) model=$(realpath -- "$value") ;;
    --data=*) data=$(realpath -- "$value") ;;
    --trainers=*) trainers=$value ;;
    --ours=*) read -ra ours <<<"$value" ;;
    --rounds=*) rounds=$value ;;
    --steps=*) steps=$value ;;
    --time_limit_s=*) time_limit_s=$value ;;
    --out=*) out=$(realpath -m -- "$value") ;;
    -h | --help) usage && exit ;;
    *) fail "unknown argument $argument; see tools/bench_peers.sh --help" ;;
  esac
done
[[ ${#workloads[@]} -gt 0 ]] || workloads=(fixed long)
if [[ " ${workloads[*]} " == *" natural "* ]]; then
  [[ -f $model/config.json ]] || fail "natural needs --model=DIR with a config.json; got '$model'"
  [[ -f $data ]] || fail "natural needs --data=FILE of GSM8K's JSON lines; got '$data'"
fi
for number in "$rounds" "$time_limit_s"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "--rounds and --time_limit_s count from 1; got $number"
done
[[ $steps =~ ^[1-9][0-9]*$ && $steps -ge 2 ]] || fail "--steps=$steps: the first one is not timed"
IFS=, read -ra trainers <<<"$trainers"
for trainer in "${trainers[@]}"; do
  [[ $trainer =~ ^(ours|tunix|trl)$ ]] || fail "unknown trainer $trainer; there are ours, tunix, trl"
done

PEERS_VENVS=$(realpath -m -- "${PEERS_VENVS:-"$(dirname "$0")/../.peers"}")
out=${out:-$PEERS_VENVS/results}
cd "$(dirname "$0")/.."
if [[ -z ${PYTHON:-} ]]; then
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi

# The stamp is written last: an interrupted installation is done again.
make_venv() {
  local venv=$PEERS_VENVS/$1 requirements=tools/peers/requirements-$1.txt
  [[ ! $venv.stamp -nt $requirements ]] || return 0
  echo "making $venv from $requirements" >&2
  "$PYTHON" -m venv --clear "$venv" \
    && "$venv/bin/python" -m pip install --disable-pip-version-check --quiet -r "$requirements" >&2 \
    && touch "$venv.stamp"
}

# The command line of a trainer at a workload, in the array `command`.
command_of() {
  local trainer=$1 workload=$2
  local shape=(--prompts=2 --group=8 --prompt_len=128 --new=64)
  local lengths=fixed weights=()
  case $workload in
    long) shape=(--prompts=2 --group=8 --prompt_len=512 --new=64) ;;
    natural)
      shape=(--prompts=2 --group=8 --prompt_len=256 --new=256)
      lengths=real weights=("--model=$model" "--data=$data")
      ;;
  esac
  if [[ $trainer == ours ]]; then
    command=("$PYTHON" tools/bench.py step --shape=smollm2-135m "${shape[@]}"
      "--lengths=$lengths" "${weights[@]}" "--repeats=$((steps - 1))" --json "${ours[@]}")
  else
    # Microbatches of one prompt: with all at once Tunix is killed for memory at 4 x 8.
    command=("$PEERS_VENVS/$trainer/bin/python" -m "tools.peers.${trainer}_grpo" "${shape[@]}"
      "${weights[@]}" --micro=1 "--steps=$steps")
  fi
}

# How a run ended that printed no result. Out of memory comes as SIGKILL or as an error message.
failure_of() {
  local status=$1 seconds=$2 log=$3
  if ((status == 124 || (status != 0 && seconds >= time_limit_s))); then
    echo "time-out (${time_limit_s} s)"
  elif ((status == 137)) || grep -qE "RESOURCE_EXHAUSTED|MemoryError|can't allocate memory" "$log"; then
    echo "out of memory"
  elif ((status == 127)) || grep -qE "^(ModuleNotFound|Import)Error" "$log"; then
    echo "not installed"
  elif ((status == 0)); then
    echo "no result printed"
  else
    echo "exit $status"
  fi
}

# Runs one and appends its record. Should memory run out, the kernel is to kill this and no other.
run() {
  local workload=$1 round=$2 trainer=$3 command status=0 started=$SECONDS result outcome
  local log=$out/$workload-$round-$trainer
  command_of "$trainer" "$workload"
  (
    { echo 1000 >/proc/self/oom_score_adj; } 2>/dev/null || true
    exec timeout --foreground --kill-after=10 "$time_limit_s" "${command[@]}" \
      >"$log.out" 2>"$log.log"
  ) || status=$?
  result=$(grep '^{"' "$log.out" | tail -n 1) || true
  if ((status == 0)) && [[ -n $result ]]; then
    outcome="\"result\": $result"
    echo "$workload, round $round, $trainer: done in $((SECONDS - started)) s" >&2
  else
    local failure
    failure=$(failure_of "$status" $((SECONDS - started)) "$log.log")
    outcome="\"failure\": \"$failure\""
    echo "$workload, round $round, $trainer: $failure; see $log.log" >&2
  fi
  printf '{"workload": "%s", "round": %d, "trainer": "%s", %s}\n' \
    "$workload" "$round" "$trainer" "$outcome" >>"$out/records.jsonl"
}

for trainer in "${trainers[@]}"; do
  [[ $trainer == ours ]] || make_venv "$trainer" || echo "$trainer could not be installed" >&2
done
mkdir -p "$out"
: >"$out/records.jsonl"
export HF_HUB_OFFLINE=1 PYTHONPATH=.
trap 'exit 130' INT # otherwise Ctrl-C ends one run, and the next one starts
for workload in "${workloads[@]}"; do
  for ((round = 1; round <= rounds; round++)); do
    for trainer in "${trainers[@]}"; do
      run "$workload" "$round" "$trainer"
    done
  done
done
"$PYTHON" tools/peers/compare.py "$out/records.jsonl"
