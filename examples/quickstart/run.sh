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
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --data | --output | --seed) [ $# -ge 2 ] || { echo "quickstart: $1 needs a value" >&2; exit 2; } ;;&
        --data) DATA=(--data "$2"); shift 2 ;;
        --output) OUTPUT=$2; shift 2 ;;
        --seed) SEED=$2; shift 2 ;;
        *) echo "quickstart: unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
done

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=tools/environment.sh
. "$CHECKOUT/tools/environment.sh"
prepare_environment

# Two processes need two GPUs or none.
gpus=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)
[ "$gpus" -ge 2 ] || export CUDA_VISIBLE_DEVICES=
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 2 ? cores / 2 : 1))}
export PYTHONPATH="$CHECKOUT/examples${PYTHONPATH:+:$PYTHONPATH}" # for quickstart.oracle
export QUICKSTART_ORACLE="$OUTPUT/inputs/oracle.json"

began=$SECONDS
python -m quickstart.prepare --output "$OUTPUT" --seed "$SEED" "${DATA[@]}"
python -m torch.distributed.run --standalone --nproc-per-node 2 -m exo_megatron run \
    --config "$CHECKOUT/examples/quickstart/pipeline.yaml" output="$OUTPUT" seed="$SEED"
python -m quickstart.finish --output "$OUTPUT"
echo "time        $((SECONDS - began)) s"
