#!/usr/bin/env bash
# Train: launch/run.sh --config=configs/xl2.py --workdir=DIR [further flags of mdt_jax.main]
#
# The exit code says what became of the run, which schedulers ask for:
#   0   it is finished: its report.json is there
#   75  it was stopped by SIGTERM and saved; the same command resumes
#   any other: it failed
# SIGTERM and Ctrl-C are passed on. LAUNCHER stands before the command, such as "srun"; PYTHON is
# the interpreter.
set -uo pipefail

workdir='' before=''
for flag in "$@"; do
    case $before in --workdir | -workdir) workdir=$flag ;; esac
    case $flag in --workdir=* | -workdir=*) workdir=${flag#*=} ;; esac
    before=$flag
done
if [[ -z $workdir ]]; then
    echo "error: --workdir is missing" >&2
    exit 2
fi

asked=0
# shellcheck disable=SC2329  # the trap calls it
stop() {
    asked=$((asked + 1))
    kill -TERM "$child" 2>/dev/null
}

# shellcheck disable=SC2086  # LAUNCHER may be several words
${LAUNCHER:-} "${PYTHON:-python}" -m mdt_jax.main "$@" &
child=$!
trap stop TERM INT

# A signal ends `wait` before the child has ended: wait again, until none has come.
code='' seen=-1
while [[ $seen != "$asked" ]]; do
    seen=$asked
    wait "$child"
    code=$?
done

# Told to end before it could save: nothing is lost, and nothing is wrong.
if [[ $code == 143 ]]; then
    exit 75
fi
if [[ $code == 0 ]]; then
    # The first process writes the report; listing the folder makes NFS look anew, and others
    # may take some seconds until each machine sees it.
    for _ in {1..10}; do
        ls "$workdir" >/dev/null 2>&1
        [[ -e $workdir/report.json ]] && exit 0
        [[ $asked -gt 0 ]] && break
        sleep 1
    done
    exit 75
fi
exit "$code"
