#!/usr/bin/env bash
# A command on all machines of a TPU pod: launch/tpu/pod.sh SUBCOMMAND [COMMAND FLAGS]
#
#   create               request the pod, wait until it is active, install
#   install              copy the code to all its machines, as it is committed (HEAD)
#   run COMMAND FLAGS    start a command on all machines, in the background
#   watch COMMAND FLAGS  create and run, and again after each preemption, until it is finished
#   logs                 follow the log of one machine (WORKER, 0)
#   stop                 save and stop
#   delete               delete the pod
#
# COMMAND is one of launch/run.sh: train, encode, sample, evaluate, inpaint, convert or info. The
# machines share no disk: workdir, data and outputs are in a bucket.
#
# Variables:
#   TPU_NAME         name of the pod and of its queued resource (mdt-jax)
#   ZONE             where it is, such as us-west4-a
#   ACCELERATOR      its kind and size, such as v5litepod-16
#   RUNTIME_VERSION  the software of its machines (Google's for JAX on this kind)
#   PROJECT          the project of Google Cloud (gcloud's own setting)
#   SERVICE_ACCOUNT  the account by which the machines access buckets (the project's default)
#   SPOT             1 for spot machines, which are cheaper and can be preempted (0)
#   CREATE_FLAGS     further flags of `gcloud compute tpus queued-resources create` (none)
#   SSH_FLAGS        further flags of `gcloud compute tpus tpu-vm ssh` and `scp` (none)
#   SETUP            a command that each machine runs before the code is installed (none)
#   PERIOD           seconds between two checks by create and watch (60)
set -euo pipefail

TPU_NAME=${TPU_NAME:-mdt-jax}
place=(--zone="${ZONE:?is not set}")
if [[ -n ${PROJECT:-} ]]; then
    place+=(--project="$PROJECT")
fi
read -ra create_flags <<<"${CREATE_FLAGS:-}"
read -ra ssh_flags <<<"${SSH_FLAGS:-}"
period=${PERIOD:-60}
root=$(dirname "$0")/../..

tpu() { gcloud compute tpus "$@" "${place[@]}"; }

# on WORKER COMMAND: run a shell command on one machine, or on all.
on() { tpu tpu-vm ssh "$TPU_NAME" --worker="$1" --command="$2" "${ssh_flags[@]}"; }

# gcloud connects to several machines only with a key that an SSH agent holds.
check_agent() {
    if ! ssh-add -l >/dev/null 2>&1; then
        echo 'error: no SSH agent holds a key, which gcloud needs for several machines; run' \
            "eval \"\$(ssh-agent)\" && ssh-add ~/.ssh/google_compute_engine" >&2
        return 1
    fi
}

# The state of the queued resource: ACTIVE, SUSPENDED, …, or NONE if it does not exist. Fails with
# gcloud's message if gcloud cannot tell.
state() {
    local message
    {
        message=$(tpu queued-resources describe "$TPU_NAME" --format='value(state.state)' \
            2>&1 >&3) && return
    } 3>&1
    if [[ $message != *NOT_FOUND* ]]; then
        echo "$message" >&2
        return 1
    fi
    echo NONE
}

await_pod() {
    local now
    while :; do
        now=$(state) || return
        case $now in
            ACTIVE) return ;;
            FAILED | SUSPEND* | NONE | DELETING)
                echo "error: $TPU_NAME is $now" >&2
                return 1
                ;;
        esac
        echo "$TPU_NAME is $now"
        sleep "$period"
    done
}

# The software for JAX, from https://cloud.google.com/tpu/docs/runtimes.
runtime_version() {
    case $ACCELERATOR in
        v6e-*) echo v2-alpha-tpuv6e ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        *) echo "${RUNTIME_VERSION:?is not set}" ;;
    esac
}

# The account's roles alone decide what the machines may access, as Google recommends.
create() {
    local version flags=(--scopes=https://www.googleapis.com/auth/cloud-platform)
    if [[ -n ${SERVICE_ACCOUNT:-} ]]; then
        flags+=(--service-account="$SERVICE_ACCOUNT")
    fi
    if [[ ${SPOT:-0} == 1 ]]; then
        flags+=(--spot)
    fi
    : "${ACCELERATOR:?is not set}"
    version=${RUNTIME_VERSION:-$(runtime_version)}
    tpu queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" \
        --accelerator-type="$ACCELERATOR" --runtime-version="$version" \
        "${flags[@]}" "${create_flags[@]}"
    await_pod
    install
}

# The machines have an older Python than mdt_jax needs; uv fetches one.
install() {
    local archive
    archive=$(mktemp)
    git -C "$root" archive --format=tar.gz --output="$archive" HEAD
    tpu tpu-vm scp "$archive" "$TPU_NAME:mdt_jax.tar.gz" --worker=all "${ssh_flags[@]}"
    rm "$archive"
    on all "set -e
        ${SETUP:-}
        mkdir -p mdt_jax
        tar -xzf mdt_jax.tar.gz -C mdt_jax
        python3 -m pip install --quiet --user uv
        cd mdt_jax
        python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
        python3 -m uv pip install --quiet --python .venv/bin/python \
            --constraint launch/constraints.txt -e '.[tpu,data,gcs,parquet]'"
}

# Each machine's ~/mdt_jax has the command, the log and the number of its process and, at the end,
# the exit code. The machines sign their messages with a token, new at each start.
run() {
    local token machines=all platform=''
    token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    # These need no TPU, and the TPU of a single machine does not start without the others.
    case ${1:-} in convert | info) machines=0 platform='export JAX_PLATFORMS=cpu' ;; esac
    on "$machines" "cd mdt_jax || exit
        if kill -0 \"\$(cat run.pid 2>/dev/null)\" 2>/dev/null; then
            echo 'error: a command is running already' >&2
            exit 1
        fi
        rm -f run.pid run.exit
        export PYTHON=.venv/bin/python MDT_JAX_RUN_TOKEN=$token
        $platform
        setsid bash -c '
            echo \"\$*\" >run.command
            launch/run.sh \"\$@\" & echo \$! >run.pid
            wait \$!; echo \$? >run.exit' run ${*@Q} </dev/null >>run.log 2>&1 &"
}

# Sends SIGTERM on every machine, and waits until the processes have saved and ended.
# shellcheck disable=SC2016  # the machines expand it
stop() {
    on all 'cd mdt_jax && pid=$(cat run.pid) || exit 0
        kill -TERM "$pid" 2>/dev/null
        while kill -0 "$pid" 2>/dev/null; do sleep 1; done'
}

# progress COMMAND FLAGS: the state of the first machine: running, the exit code of the command,
# idle (another command ended there), lost (restarted, or has run nothing yet) or unreachable.
progress() {
    local sum
    sum=$(echo "$*" | cksum)
    on 0 "cd mdt_jax 2>/dev/null
        if kill -0 \"\$(cat run.pid)\"; then
            echo running
        elif [[ ! -e run.exit ]]; then
            echo lost
        elif [[ \$(cksum <run.command) == '$sum' ]]; then
            cat run.exit
        else
            echo idle
        fi 2>/dev/null" || echo unreachable
}

watch() {
    local now failures=0 running=0
    while :; do
        now=$(state) || now='state unknown'
        if [[ $now == ACTIVE ]]; then
            now=$(progress "$@" | tail -n 1)
        fi
        echo "$TPU_NAME: $now"
        # Failures add up only if no long run lies between them.
        if [[ $now != running ]]; then
            running=0
        elif ((++running == 10)); then
            failures=0
        fi
        case $now in
            0) return ;;
            NONE) { "$0" create && "$0" run "$@"; } || true ;;
            FAILED | SUSPENDED) "$0" delete || true ;;
            lost) { "$0" install && "$0" run "$@"; } || true ;;
            idle) "$0" run "$@" || true ;;
            [0-9]*)
                # The cause of a failure may be that another machine was lost.
                if [[ $now != 75 ]] && ((++failures > 3)); then
                    echo "error: ${1:-} failed with exit code $now; see $0 logs" >&2
                    return 1
                fi
                { "$0" stop && "$0" run "$@"; } || true
                ;;
        esac
        sleep "$period"
    done
}

subcommand=${1:-}
shift || true
case $subcommand in
    create | install | run | stop | watch)
        check_agent
        "$subcommand" "$@"
        ;;
    logs) on "${WORKER:-0}" 'tail -n 100 -F mdt_jax/run.log' ;;
    delete) tpu queued-resources delete "$TPU_NAME" --force --quiet ;;
    *)
        sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
