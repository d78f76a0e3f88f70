# shellcheck shell=bash
# Sourced by scripts that must work in a bare clone: makes `python` one that has exo-megatron.
#
#   . tools/environment.sh && prepare_environment dev,mpi,bench
#
# An active virtual (or conda) environment is used; otherwise one is made in .venv of the checkout. Where there is no
# NVIDIA GPU and no torch yet, the pinned CPU build of torch comes first: unpinned, pip brings gigabytes of CUDA
# packages. Does nothing when this checkout with these extras is already installed.

EXO_CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
EXO_CPU_TORCH=2.13.0

_exo_is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

_exo_find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.11 python3.12 python3.13 python; do
        if _exo_is_recent "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "exo-megatron: error: no Python >= 3.11 found; install one or set PYTHON" >&2
    return 1
}

_exo_has_gpu() { nvidia-smi -L 2>/dev/null | grep -q GPU; }

# pip without its chatter unless it fails.
_exo_pip() {
    local log
    log=$(mktemp)
    if ! python -m pip install "$@" >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        echo "exo-megatron: error: pip install $* failed; its whole output: $log" >&2
        return 1
    fi
    rm -f "$log"
}

# Installs the checkout with the given extras (comma-separated, may be empty) into the environment.
prepare_environment() {
    local extras=${1:-} prefix stamp wanted found began=$SECONDS
    prefix=${VIRTUAL_ENV:-}
    [ "${CONDA_DEFAULT_ENV:-base}" = base ] || prefix=${prefix:-$CONDA_PREFIX}
    if [ -n "$prefix" ]; then
        if ! _exo_is_recent python; then
            echo "exo-megatron: error: $prefix has $(python --version 2>&1), not Python >= 3.11; deactivate it" >&2
            return 1
        fi
    else
        prefix=$EXO_CHECKOUT/.venv
        if [ ! -x "$prefix/bin/python" ]; then
            found=$(_exo_find_python) || return 1
            echo "making a virtual environment in $prefix ($("$found" --version))"
            "$found" -m venv "$prefix" || return 1
        fi
        # shellcheck disable=SC1091
        . "$prefix/bin/activate" || return 1
    fi
    stamp=$prefix/.exo-megatron-${extras//,/-}
    wanted="$EXO_CHECKOUT $(cksum <"$EXO_CHECKOUT/setup.py")"
    [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || return 0
    echo "installing exo-megatron${extras:+[$extras]} into $prefix"
    if ! _exo_has_gpu && ! python -c 'import torch' 2>/dev/null; then
        _exo_pip "torch==$EXO_CPU_TORCH" || return 1
    fi
    _exo_pip -e "$EXO_CHECKOUT${extras:+[$extras]}" || return 1
    echo "$wanted" >"$stamp"
    echo "installed in $((SECONDS - began)) s"
}
