#!/usr/bin/env bash
# A run on all machines of a TPU pod: launch/tpu/pod.sh COMMAND [flags of mdt_jax.main]
#
#   create        ask for the pod, wait until it is there, install
#   install       put the code on all its machines: what is committed, HEAD
#   run FLAGS     start training on all machines, in the background
#   logs          follow the log of one machine (WORKER, 0)
#   stop          save and stop
#   delete        give the pod back
#   watch FLAGS   create and run, and again after each preemption, until the run is finished
#
# Variables:
#   TPU_NAME         name of the pod and of its queued resource (mdt-jax)
#   ZONE             where it is, such as us-west4-a
#   ACCELERATOR      its kind and size, such as v5litepod-16
#   RUNTIME_VERSION  the software of its machines, such as v2-alpha-tpuv5-lite
#   PROJECT          the project of Google Cloud (gcloud's own setting)
#   SPOT             1 for spot machines, which are cheaper and may be taken away (0)
#   SETUP            a command for each new machine, which mounts the shared disk (none)
#   PERIOD           seconds between two looks of create and watch (60)
set -euo pipefail

TPU_NAME=${TPU_NAME:-mdt-jax}
place=(--zone="${ZONE:?is not set}")
if [[ -n ${PROJECT:-} ]]; then
    place+=(--project="$PROJECT")
fi
period=${PERIOD:-60}
root=$(dirname "$0")/../..

# What can be done to a pod, in the words of gcloud.
tpu() { gcloud compute tpus "$@" "${place[@]}"; }


# on WORKER COMMAND: in a shell of one of its machines, or of all.
on() { tpu tpu-vm ssh "$TPU_NAME" --worker="$1" --command="$2"; }

# Of the queued resource: ACTIVE, SUSPENDED, …, or NONE.
state() {
    tpu queued-resources describe "$TPU_NAME" --format='value(state.state)' 2>/dev/null || echo NONE
}

await_pod() {
    local now
    while now=$(state) && [[ $now != ACTIVE ]]; do
        case $now in
            FAILED | SUSPEND* | NONE | DELETING)
                echo "error: $TPU_NAME is $now" >&2
                return 1
                ;;
        esac
        echo "$TPU_NAME is $now"
        sleep "$period"
    done
}

create() {
    local spot=()
    if [[ ${SPOT:-0} == 1 ]]; then
        spot=(--spot)
    fi
    tpu queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" \
        --accelerator-type="${ACCELERATOR:?is not set}" \
        --runtime-version="${RUNTIME_VERSION:?is not set}" "${spot[@]}"
    await_pod
    install
}

# The machines bring an older Python than mdt_jax needs; uv fetches one.
install() {
    local archive
    archive=$(mktemp)
    git -C "$root" archive --format=tar.gz --output="$archive" HEAD
    tpu tpu-vm scp "$archive" "$TPU_NAME:mdt_jax.tar.gz" --worker=all
    rm "$archive"
    on all "set -e
        ${SETUP:-}
        mkdir -p mdt_jax
        tar -xzf mdt_jax.tar.gz -C mdt_jax
        python3 -m pip install --quiet --user uv
        cd mdt_jax
        python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
        python3 -m uv pip install --quiet --python .venv/bin/python \
            --constraint launch/constraints.txt -e '.[tpu,data]'"
}

# On each machine ~/mdt_jax has the log of its part, the process and, at the end, its exit code.
# What the machines tell each other is signed with a token, new each time.
run() {
    local token
    token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    on all "cd mdt_jax || exit
        if kill -0 \"\$(cat train.pid 2>/dev/null)\" 2>/dev/null; then
            echo 'error: a run is going on' >&2
            exit 1
        fi
        rm -f train.pid train.exit
        export PYTHON=.venv/bin/python MDT_JAX_RUN_TOKEN=$token
        setsid bash -c '
            launch/run.sh \"\$@\" & echo \$! >train.pid
            wait \$!; echo \$? >train.exit' run ${*@Q} </dev/null >>train.log 2>&1 &"
}

# Every machine is told; one would do. Waits until they have saved and ended.
# shellcheck disable=SC2016  # the machines expand it
stop() {
    on all 'cd mdt_jax && pid=$(cat train.pid) || exit 0
        kill -TERM "$pid" 2>/dev/null
        while kill -0 "$pid" 2>/dev/null; do sleep 1; done'
}

# What became of the first machine's part: running, its exit code, lost (the machine was started
# anew, or nothing has been run) or unreachable.
# shellcheck disable=SC2016
progress() {
    on 0 'cd mdt_jax 2>/dev/null
        if kill -0 "$(cat train.pid)"; then
            echo running
        else
            cat train.exit || echo lost
        fi 2>/dev/null' || echo unreachable
}

watch() {
    local now failures=0
    while :; do
        now=$(state)
        if [[ $now == ACTIVE ]]; then
            now=$(progress | tail -n 1)
        fi
        echo "$TPU_NAME: $now"
        case $now in
            0) return ;;
            NONE) { "$0" create && "$0" run "$@"; } || true ;;
            FAILED | SUSPENDED) "$0" delete || true ;;
            lost) { "$0" install && "$0" run "$@"; } || true ;;
            [0-9]*)
                # A failure may be that another machine was lost.
                if [[ $now != 75 ]] && ((++failures > 3)); then
                    echo "error: training failed with exit code $now; see $0 logs" >&2
                    return 1
                fi
                { "$0" stop && "$0" run "$@"; } || true
                ;;
        esac
        sleep "$period"
    done
}

command=${1:-}
shift || true
case $command in
    create | install | run | stop | watch) "$command" "$@" ;;
    logs) on "${WORKER:-0}" 'tail -n 100 -F mdt_jax/train.log' ;;
    delete) tpu queued-resources delete "$TPU_NAME" --force --quiet ;;
    *)
        sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
