#!/usr/bin/env bash
# What tools/tpu_pod.sh has done on one worker of a pod slice. It runs there, in the unpacked code.
#
#   tpu_worker.sh install PYTHON EXTRAS   makes ~/grpo_venv with this package and its requirements
#   tpu_worker.sh launch FLAG ...         starts grpo.launch in the background, in this folder
#   tpu_worker.sh status                  one line: running, ended, gone or not started
#   tpu_worker.sh logs                    the log, until the run ends
#   tpu_worker.sh stop                    SIGTERM, on which a run saves; SIGKILL ten minutes later
#   tpu_worker.sh idle                    fails if a run is going on
#
# ~/grpo_run keeps `log`, and `pid` and `exit_code` of the last run.
set -euo pipefail
cd "$(dirname "$0")/.."

run=$HOME/grpo_run venv=$HOME/grpo_venv
stop_s=600 # a checkpoint of a large model to a bucket takes minutes

fail() {
  echo "$(hostname): $1" >&2
  exit 1
}

# A number may belong to another process by now, after a reboot for instance: the name counts too.
pid_of_run() {
  local pid
  pid=$(cat "$run/pid" 2>/dev/null) || return 1
  tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q -- " -m grpo.launch " || return 1
  echo "$pid"
}

idle() {
  local pid
  ! pid=$(pid_of_run) || fail "a run is going on (pid $pid); stop it first"
}

# TPU images bring Python 3.10 or 3.12, as they like; uv brings the one that is asked for.
install() {
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null \
    || curl --proto '=https' -LsSf https://astral.sh/uv/install.sh | sh >/dev/null 2>&1 \
    || fail "uv could not be installed; has this worker a way to the internet (external IP or NAT)?"
  uv venv --quiet --allow-existing --python "$1" "$venv"
  uv pip install --quiet --python "$venv/bin/python" --editable ".[$2]"
  echo "$(hostname): installed, jax $("$venv/bin/python" -c 'import jax, grpo; print(jax.__version__)')"
}

# In a session of its own the run outlives the connection, and can be killed as a whole.
launch() {
  idle
  [[ -x $venv/bin/python ]] || fail "there is no $venv/bin/python; install first"
  mkdir -p "$run"
  rm -f "$run/pid" "$run/exit_code"
  # shellcheck disable=SC2016 # expanded by the inner shell
  setsid bash -c '
    run=$1 && shift
    "$@" &
    echo $! >"$run/pid"
    code=0 && wait $! || code=$?
    echo "$code" >"$run/exit_code"
  ' launch "$run" "$venv/bin/python" -m grpo.launch "$@" </dev/null >>"$run/log" 2>&1 &
  until [[ -s $run/pid ]]; do sleep 0.1; done
  echo "$(hostname): launched (pid $(cat "$run/pid"))"
}

status() {
  local pid said
  if pid=$(pid_of_run); then
    said="running (pid $pid, for $(ps -o etime= -p "$pid" | tr -d ' '))"
  elif [[ -s $run/exit_code ]]; then
    said="ended (exit code $(cat "$run/exit_code"))"
  elif [[ -s $run/pid ]]; then
    said="gone (killed, or the machine was restarted)"
  else
    said="not started"
  fi
  echo "$(hostname): $said"
}

logs() {
  local pid
  if pid=$(pid_of_run); then
    tail -n 200 --pid="$pid" -F "$run/log"
  else
    tail -n 200 "$run/log"
  fi
  status
}

stop() {
  local pid group deadline=$((SECONDS + stop_s))
  if pid=$(pid_of_run); then
    group=$(ps -o pgid= -p "$pid" | tr -d ' ')
    kill -TERM "$pid"
    while pid_of_run >/dev/null; do
      if ((SECONDS >= deadline)); then
        kill -KILL -- "-$group"
        echo 137 >"$run/exit_code"
        fail "did not leave within $stop_s s of SIGTERM and was killed"
      fi
      sleep 0.2
    done
    until [[ -s $run/exit_code ]]; do sleep 0.1; done # its shell writes it
  fi
  status
}

command=${1:-}
shift || true
case $command in
  install | launch | status | logs | stop | idle) "$command" "$@" ;;
  *) fail "unknown command '$command'; there are install, launch, status, logs, stop, idle" ;;
esac
