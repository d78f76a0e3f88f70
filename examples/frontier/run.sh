#!/usr/bin/env bash
# When EXO beats DPO: both losses swept over beta_r and compared at equal KL, on policies whose KL is exact.
#
#   bash examples/frontier/run.sh [--output DIR] [--data FILE] [--small] [--stages]
#
# --output  where everything goes (default outputs/frontier); an interrupted run goes on there
# --data    real labelled texts (JSONL, {"text", "label"}, label 1 = positive) instead of the quickstart's grammar
# --small   one bigram policy and few runs, in a minute
# --stages  also the same question through the project's own stages, all parameters trained; longer than all the rest
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

OUTPUT=outputs/frontier
DATA=()
SMALL=()
STAGES=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --small) SMALL=(--small); shift; continue ;;
        --stages) STAGES=(yes); shift; continue ;;
        --data | --output) ;;
        *) echo "frontier: unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
    [ $# -ge 2 ] || { echo "frontier: $1 needs a value" >&2; exit 2; }
    case $1 in
        --data) DATA=(--data "$2") ;;
        --output) OUTPUT=$2 ;;
    esac
    shift 2
done
if [ ${#DATA[@]} -gt 0 ]; then
    [ -r "${DATA[1]}" ] || { echo "frontier: --data ${DATA[1]}: no such file" >&2; exit 2; }
fi

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=tools/environment.sh
. "$CHECKOUT/tools/environment.sh"
prepare_environment

export CUDA_VISIBLE_DEVICES= # models this small are faster without
export OMP_NUM_THREADS=1     # one run per core instead
export PYTHONPATH="$CHECKOUT/examples${PYTHONPATH:+:$PYTHONPATH}"

began=$SECONDS
# The form ${NAME[@]+...} is for bash 3 and 4.3, to which an empty array is an unset variable.
if [ ${#STAGES[@]} -gt 0 ]; then
    export QUICKSTART_ORACLE="$OUTPUT/stages/inputs/oracle.json"
    python -m quickstart.prepare --output "$OUTPUT/stages" ${DATA[@]+"${DATA[@]}"}
    python -m frontier.stages --output "$OUTPUT/stages"
    python -m torch.distributed.run --standalone --nproc-per-node 2 -m exo_megatron run \
        --config "$OUTPUT/stages/workflow.yaml"
    echo "time of the stages  $((SECONDS - began)) s"
    STAGES=(--stages "$OUTPUT/stages")
    began=$SECONDS
fi
python -m frontier --output "$OUTPUT" ${DATA[@]+"${DATA[@]}"} ${SMALL[@]+"${SMALL[@]}"} ${STAGES[@]+"${STAGES[@]}"}
echo "time        $((SECONDS - began)) s"
