#!/usr/bin/env bash
# Every check of the project, from a bare clone:
#
#   bash tests/run.sh                 all parts
#   bash tests/run.sh lint types      only these: lint format types imports unit multiprocess slurm
#
# Stops at the first part that fails. The last line counts the tests.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
readonly ALL_PARTS="lint format types imports unit multiprocess slurm"
PARTS=${*:-$ALL_PARTS}
for part in $PARTS; do
    [[ " $ALL_PARTS " == *" $part "* ]] || { echo "unknown part: $part; expected: $ALL_PARTS" >&2; exit 2; }
done

# shellcheck source=tools/environment.sh
. tools/environment.sh
prepare_environment dev,mpi,bench || exit 1
export OMP_NUM_THREADS=1 # several processes on few cores
unset PYTHONDONTWRITEBYTECODE # hundreds of processes import the same files; none need compile them again
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
SUMMARY=()

# CI machines get Slurm; anybody else's machine is left as it is, and the Slurm tests say why they are skipped.
install_slurm() {
    if [ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && ! command -v slurmctld >/dev/null && command -v apt-get >/dev/null; then
        echo "installing slurm-wlm and munge"
        { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
            slurm-wlm munge; } >"$LOGS/apt" 2>&1 || { tail -n 5 "$LOGS/apt"; echo "could not install Slurm"; }
    fi
}

# The time limit ends what hangs; it is many times what the part takes on two idle cores.
run_pytest() { timeout --kill-after=20 "$1" python -m pytest -q --durations=5 "${@:2}"; }

# As many test files at a time as there are cores, at most four: some tests start four processes, with a model in each.
# Files come in the order of tests/conftest.py, not by their number of tests.
readonly SIDE_BY_SIDE="--numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder"

command_of() {
    case $1 in
        lint) ruff check . ;;
        format) ruff format --check . ;;
        types) mypy ;;
        imports) lint-imports --no-logo ;;
        # shellcheck disable=SC2086
        unit) run_pytest 1200 tests --ignore=tests/multiprocess --ignore=tests/slurm $SIDE_BY_SIDE ;;
        # shellcheck disable=SC2086
        multiprocess) run_pytest 2400 tests/multiprocess $SIDE_BY_SIDE ;;
        slurm) install_slurm && run_pytest 1200 tests/slurm ;;
    esac
}

run_part() {
    local part=$1 began=$SECONDS code
    echo "=== $part"
    command_of "$part" 2>&1 | tee "$LOGS/$part"
    code=${PIPESTATUS[0]}
    [ "$code" -ne 124 ] || echo "$part took too long and was stopped"
    SUMMARY+=("$(printf '%-14s %-7s %4d s' "$part" "$([ "$code" -eq 0 ] && echo ok || echo FAILED)" $((SECONDS - began)))")
    return "$code"
}

# Sum of "N WORD" over pytest's closing lines.
count() {
    local total=0 number
    for number in $(tail -qn 1 "$LOGS"/{unit,multiprocess,slurm} 2>/dev/null | grep -oE "[0-9]+ $1" | cut -d' ' -f1); do
        total=$((total + number))
    done
    echo "$total"
}

result=0
for part in $PARTS; do
    run_part "$part" || { result=1; break; }
done
echo "=== summary ($SECONDS s with installation)"
printf '%s\n' "${SUMMARY[@]}"
failed=$(($(count failed) + $(count error)))
[ "$result" -eq 0 ] || echo "failed: ${part}; the parts after it were not run"
echo "tests: $(count passed) passed, $failed failed, $(count skipped) skipped"
exit "$result"
