#!/usr/bin/env bash
# One stage of exo-megatron (default: align) for a 6B-class model, one task per GPU.
#
#   MODEL=ckpt/llama-6b-sft DATA=runs/scored OUTPUT=runs/exo sbatch slurm/exo_6b.sh
#   TP=4 PP=2 EXTRA='loss.kind=dpo_rw batch.groups=128' ... sbatch --nodes=4 slurm/exo_6b.sh
#
# Shape of the job: options of sbatch on the command line win over the #SBATCH lines, e.g. --nodes=8,
# --gres=gpu:4 --ntasks-per-node=4, --gres=none (CPU nodes), --time=2:00:00, --partition=NAME.
#
# Environment, with [defaults]; what is not set comes from the configuration file:
#   STAGE            sft, rollout, score, align, evaluate, import, export, or run for a file of stages [align]
#   CONFIG           configuration file of the stage [for align: examples/configs/align_6b.yaml]
#   OUTPUT           output directory, on a file system that all nodes share [outputs/STAGE-JOBID]
#   MODEL, DATA      checkpoint and data of the stage (align: model.checkpoint and data.path)
#   TP, PP, EP       tensor-, pipeline- and expert-parallel size
#   EXTRA            more key=value settings, separated by blanks
#   GPUS_PER_NODE    tasks per node, where it differs from sbatch's --ntasks-per-node
#   VENV, PYTHON     virtual environment to use, or the Python to run [python3]
#   CONTAINER_IMAGE  run in this image with pyxis; CONTAINER_MOUNTS adds mounts (SRC:DST,...) to the checkout, the
#                    working directory and OUTPUT's parent; CONTAINER_WORKDIR [the working directory]
#   SRUN_ARGS        more options of srun, separated by blanks
#   MAX_RESTARTS     requeues after the time limit or a preemption [50]
#   MAX_CRASHES      restarts in place after a crash, per start of the job [3]
#   RETRY_DELAY      seconds before such a restart [10]
#   EXIT_WAIT        seconds that tasks may go on after the first has ended [600]
#   EXO_ROOT         checkout of exo-megatron [the one of this script]
#
# 120 s before the time limit, and on preemption, sft and align save and exit 75; the job requeues itself and goes on
# from that checkpoint. Wrong input (exit 2) is never retried. NCCL variables are left to the site.
# Two jobs with the same OUTPUT: give both the same --job-name and --dependency=singleton.
#
#SBATCH --job-name=exo-6b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -uo pipefail

readonly USER_ERROR=2 TRY_AGAIN=75
RESTART=${SLURM_RESTART_COUNT:-0}
STAGE=${STAGE:-align}
MAX_RESTARTS=${MAX_RESTARTS:-50}
MAX_CRASHES=${MAX_CRASHES:-3}
RETRY_DELAY=${RETRY_DELAY:-10}
EXIT_WAIT=${EXIT_WAIT:-600}

say() { echo "[$(date '+%F %T')] exo-megatron: $*"; }
refuse() { say "error: $*" >&2; exit "$USER_ERROR"; }

# Slurm runs a copy of this file; the job record has the path of the original.
checkout() {
    local script
    script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')
    (cd "$(dirname "$script")/.." && pwd)
}

# The address of the first node: its name need not resolve on the others.
master_address() {
    local first address
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    address=$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    echo "${address:-$first}"
}

# key=value settings of the stage, one a line.
settings() {
    echo "output=$OUTPUT"
    [ -z "${MODEL:-}" ] || echo "$MODEL_KEY=$MODEL"
    [ -z "${DATA:-}" ] || echo "$DATA_KEY=$DATA"
    [ -z "${TP:-}" ] || echo "$PARALLEL_KEY.tensor=$TP"
    [ -z "${PP:-}" ] || echo "$PARALLEL_KEY.pipeline=$PP"
    [ -z "${EP:-}" ] || echo "$PARALLEL_KEY.expert=$EP"
    local word
    for word in ${EXTRA:-}; do echo "$word"; done
}

# What MODEL and DATA mean differs by stage; a variable that a stage has no use for is a mistake.
choose_keys() {
    PARALLEL_KEY=parallel
    case $STAGE in
        sft | rollout | align) MODEL_KEY=model.checkpoint DATA_KEY=data.path ;;
        evaluate) MODEL_KEY=reference.checkpoint DATA_KEY=data.path ;;
        score) MODEL_KEY='' DATA_KEY=candidates ;;
        import) MODEL_KEY=hf DATA_KEY='' ;;
        export) MODEL_KEY=model.checkpoint DATA_KEY='' ;;
        run) MODEL_KEY='' DATA_KEY='' PARALLEL_KEY=defaults.parallel ;;
        *) refuse "STAGE=$STAGE: expected sft, rollout, score, align, evaluate, import, export or run" ;;
    esac
    [ -n "$MODEL_KEY" ] || [ -z "${MODEL:-}" ] || refuse "MODEL has no meaning for STAGE=$STAGE; use EXTRA"
    [ -n "$DATA_KEY" ] || [ -z "${DATA:-}" ] || refuse "DATA has no meaning for STAGE=$STAGE; use EXTRA"
}

prepare() {
    [ -n "${SLURM_JOB_ID:-}" ] || refuse "not in a Slurm job; start it with: sbatch slurm/exo_6b.sh"
    choose_keys
    ROOT=${EXO_ROOT:-$(checkout)}
    [ -d "$ROOT/exo_megatron" ] || refuse "no exo_megatron in $ROOT; set EXO_ROOT to the checkout"
    [ "$STAGE" != align ] || CONFIG=${CONFIG:-$ROOT/examples/configs/align_6b.yaml}
    [ -n "${CONFIG:-}" ] || refuse "STAGE=$STAGE needs CONFIG, its configuration file"
    [ -f "$CONFIG" ] || refuse "CONFIG=$CONFIG does not exist"
    # Absolute, because tasks in a container may start in another folder; symbolic links stay, as in what is mounted.
    CONFIG=$(realpath -s "$CONFIG") OUTPUT=$(realpath -ms "${OUTPUT:-outputs/$STAGE-$SLURM_JOB_ID}")
    [ -z "${VENV:-}" ] || PYTHON=$VENV/bin/python
    PYTHON=${PYTHON:-python3}
    [ -n "${CONTAINER_IMAGE:-}" ] || command -v "$PYTHON" >/dev/null || refuse "there is no $PYTHON; set VENV or PYTHON"
    TASKS=${GPUS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}}
    CPUS=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / TASKS))}
    [ "$CPUS" -ge 1 ] || CPUS=1
    mkdir -p "$(dirname "$OUTPUT")" || refuse "cannot create the folder of OUTPUT=$OUTPUT"
    # Beside the log, and so on the shared file system. `started` outlives requeues.
    STATE=$PWD/.exo-slurm/$SLURM_JOB_ID
    mkdir -p "$STATE" || refuse "cannot write to $PWD; submit from a folder on a shared file system"
    [ -e "$STATE/started" ] || touch "$STATE/started"

    MASTER_ADDR=$(master_address)
    export MASTER_ADDR
    export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS}
    export PYTHONUNBUFFERED=1
}

container_options() {
    [ -n "${CONTAINER_IMAGE:-}" ] || return 0
    local parent
    parent=$(dirname "$OUTPUT")
    echo "--container-image=$CONTAINER_IMAGE"
    echo "--container-mounts=$ROOT:$ROOT,$PWD:$PWD,$parent:$parent${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    echo "--container-workdir=${CONTAINER_WORKDIR:-$PWD}"
}

# What a task runs. srun reports 143 when a task fails and takes the others along, whatever the failed task's own exit
# code was, so each task leaves its code in a file of its own. A task that has saved and stops (75) is no failure to
# srun: the others may still be saving.
# shellcheck disable=SC2016  # expanded by the tasks
readonly TASK='trap : USR2 TERM
"$@"; code=$?
echo "$code" > "$EXO_CODES/rank-$SLURM_PROCID"
[ "$code" -ne 75 ] || exit 0
exit "$code"'

run_once() {
    local attempt=$1 code options extra
    export EXO_CODES=$STATE/codes-$RESTART.$attempt
    mkdir -p "$EXO_CODES"
    # Another port for every start, so that it cannot meet a socket of the one before.
    export MASTER_PORT=$((15000 + (SLURM_JOB_ID * 101 + RESTART * 11 + attempt) % 16000))
    mapfile -t options < <(container_options)
    mapfile -t extra < <(settings)
    say "$STAGE, job $SLURM_JOB_ID, restart $RESTART, attempt $attempt:" \
        "$SLURM_JOB_NUM_NODES nodes x $TASKS tasks, rank 0 at $MASTER_ADDR:$MASTER_PORT"
    # shellcheck disable=SC2086  # SRUN_ARGS is a list of words
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * TASKS))" --ntasks-per-node="$TASKS" \
        --cpus-per-task="$CPUS" --kill-on-bad-exit=1 --wait="$EXIT_WAIT" --label "${options[@]}" ${SRUN_ARGS:-} \
        bash -c "$TASK" task "$PYTHON" -m exo_megatron "$STAGE" --config "$CONFIG" "${extra[@]}" &
    STEP=$!
    [ -z "$STOP" ] || kill -USR2 "$STEP" 2>/dev/null # the signal came before STEP was known
    while :; do
        wait "$STEP"
        code=$?
        kill -0 "$STEP" 2>/dev/null || break # a signal to this shell ends `wait` early
    done
    STEP=
    return "$code"
}

# done, wrong-input, stopped or crashed
outcome() {
    local code=$1 codes
    codes=$(cat "$EXO_CODES"/rank-* 2>/dev/null)
    if completed; then
        echo 'done'
    elif grep -qx "$USER_ERROR" <<<"$codes"; then
        echo wrong-input
    elif grep -qx "$TRY_AGAIN" <<<"$codes"; then
        echo stopped
    elif [ "$code" -eq 0 ]; then
        echo 'done'
    elif [ -n "$STOP" ]; then
        echo stopped
    else
        echo crashed
    fi
}

# The stage wrote its last file during this job, and its output is there.
completed() {
    local status=$OUTPUT/stage.json
    # An export holds only what belongs on a hub; its status is beside it.
    [ "$STAGE" != export ] || status=$(dirname "$OUTPUT")/.$(basename "$OUTPUT").exo-megatron/stage.json
    [ -d "$OUTPUT" ] && [ "$status" -nt "$STATE/started" ] && grep -q '"status": *"complete"' "$status"
}

# Slurm ends the job by itself: it was cancelled, or Slurm requeues it.
ending() { ! scontrol show job -o "$SLURM_JOB_ID" | grep -q ' JobState=RUNNING '; }

requeue() {
    if [ "$STOP" = TERM ] && ending; then
        say "stopped before the end, by Slurm; whether the job starts again is its decision"
        exit "$TRY_AGAIN"
    fi
    if [ "$RESTART" -ge "$MAX_RESTARTS" ]; then
        say "stopped before the end, and MAX_RESTARTS=$MAX_RESTARTS is used up"
        exit "$TRY_AGAIN"
    fi
    say "stopped before the end; requeueing"
    trap 'exit "$TRY_AGAIN"' TERM # how Slurm ends this shell
    scontrol requeue "$SLURM_JOB_ID" || exit "$TRY_AGAIN"
    sleep 300 &
    wait
    exit "$TRY_AGAIN"
}

# srun ends its step at once on TERM; USR2 it hands to the tasks, which save and exit.
# shellcheck disable=SC2317  # called by the trap
stop() {
    STOP=${STOP:-$1} # the first signal: after USR2, TERM only says that the time is up
    say "asked to stop; the stage saves and exits"
    [ -z "$STEP" ] || kill -USR2 "$STEP" 2>/dev/null
}

STOP='' STEP=''
prepare
trap 'stop USR2' USR2
trap 'stop TERM' TERM
for ((attempt = 0; attempt <= MAX_CRASHES; attempt++)); do
    run_once "$attempt"
    code=$?
    result=$(outcome "$code")
    case $result in
        done)
            say "$STAGE complete: $OUTPUT"
            rm -rf "$STATE"
            rmdir "$PWD/.exo-slurm" 2>/dev/null
            exit 0
            ;;
        wrong-input) exit "$USER_ERROR" ;;
        stopped) requeue ;;
        crashed) say "crashed (srun: $code; tasks: $(sort "$EXO_CODES"/rank-* 2>/dev/null | uniq -c | tr -s ' \n' ' '))" ;;
    esac
    [ "$attempt" -ge "$MAX_CRASHES" ] || sleep "$RETRY_DELAY"
    [ -z "$STOP" ] || requeue
done
say "gave up after $((MAX_CRASHES + 1)) attempts"
exit 1
