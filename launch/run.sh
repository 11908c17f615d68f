#!/usr/bin/env bash
# A command on one machine: launch/run.sh [COMMAND] [flags of the command]
#
# COMMAND is train (mdt_jax.main; the default), encode, sample, evaluate, inpaint, convert or info.
# The exit code tells a scheduler the outcome:
#   0   the command is finished
#   75  SIGTERM stopped it, and the same command resumes
#   any other: it failed
# SIGTERM and Ctrl-C are passed on. LAUNCHER stands before the command, for example "srun"; PYTHON
# is the interpreter.
set -uo pipefail

command=train
if [[ ${1:--} != -* ]]; then
    command=$1
    shift
fi
case $command in
    train) set -- main --stopped_exit_code=75 "$@" ;;
    encode | sample | evaluate | inpaint | convert | info) set -- "$command" "$@" ;;
    *)
        echo "error: $command is none of train, encode, sample, evaluate, inpaint, convert," \
            "info" >&2
        exit 2
        ;;
esac
module=mdt_jax.$1
shift

asked=0
# shellcheck disable=SC2329  # the trap calls it
stop() {
    asked=$((asked + 1))
    kill -TERM "$child" 2>/dev/null
}

# shellcheck disable=SC2086  # LAUNCHER may be several words
${LAUNCHER:-} "${PYTHON:-python}" -m "$module" "$@" &
child=$!
trap stop TERM INT

# A signal ends `wait` before the child has ended: wait again, until none has come.
code='' seen=-1
while [[ $seen != "$asked" ]]; do
    seen=$asked
    wait "$child"
    code=$?
done

# SIGTERM ended it before its first step, or where there is nothing to save.
if [[ $code == 143 ]]; then
    exit 75
fi
exit "$code"
