#!/usr/bin/env bash
# From nothing to an aligned model on two processes:
#
#   bash examples/quickstart/run.sh [--data FILE] [--output DIR] [--seed N]
#
# --data    real labelled texts (JSONL, {"text", "label"}, label 1 = positive) instead of the quickstart's own corpus
# --output  where everything goes (default outputs/quickstart); an interrupted run goes on there
set -euo pipefail

usage() { sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

OUTPUT=outputs/quickstart
SEED=0
DATA=()
SETTINGS=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --data | --output | --seed) ;;
        *) echo "quickstart: unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
    [ $# -ge 2 ] || { echo "quickstart: $1 needs a value" >&2; exit 2; }
    case $1 in
        --data) DATA=(--data "$2") ;;
        --output) OUTPUT=$2 ;;
        --seed) SEED=$2 ;;
    esac
    shift 2
done

if [ ${#DATA[@]} -gt 0 ]; then
    [ -r "${DATA[1]}" ] || { echo "quickstart: --data ${DATA[1]}: no such file" >&2; exit 2; }
    # Real language takes longer to learn than the quickstart's own.
    SETTINGS+=(stages.sft.batch.epochs=6)
fi

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=tools/environment.sh
. "$CHECKOUT/tools/environment.sh"
prepare_environment

# Two processes need two GPUs or none.
gpus=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)
[ "$gpus" -ge 2 ] || export CUDA_VISIBLE_DEVICES=
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # more threads only get in the way of so small a model
export PYTHONPATH="$CHECKOUT/examples${PYTHONPATH:+:$PYTHONPATH}" # for quickstart.oracle
export QUICKSTART_ORACLE="$OUTPUT/inputs/oracle.json"

began=$SECONDS
# The form ${NAME[@]+...} is for bash 3 and 4.3, to which an empty array is an unset variable.
python -m quickstart.prepare --output "$OUTPUT" --seed "$SEED" ${DATA[@]+"${DATA[@]}"}
python -m torch.distributed.run --standalone --nproc-per-node 2 -m exo_megatron run \
    --config "$CHECKOUT/examples/quickstart/workflow.yaml" output="$OUTPUT" seed="$SEED" ${SETTINGS[@]+"${SETTINGS[@]}"}
python -m quickstart.finish --output "$OUTPUT"
echo "time        $((SECONDS - began)) s"
