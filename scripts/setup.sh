# Sourced by the other scripts: makes .venv, installs the pinned packages, builds the kernels. Does nothing when all is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=$PWD/.venv
export TORCH_EXTENSIONS_DIR=$VENV/torch_extensions  # of this environment: another's would be compiled anew at every change
stamp=$(cat constraints.txt pyproject.toml scripts/setup.sh | sha256sum | cut -c1-16)
if [[ "$(cat "$VENV/.stamp" 2>/dev/null)" != "$stamp" ]]; then
    started=$SECONDS
    for candidate in "$VENV/bin/python" python3.12 python3.11 python3.10 python3; do
        "$candidate" -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && break
        candidate=
    done
    [[ -n "$candidate" ]] || { echo "error: Python 3.10, 3.11 or 3.12 with venv is needed (Debian: apt-get install python3-venv)" >&2; exit 1; }
    [[ -x "$VENV/bin/python" ]] || { echo "set-up 1/3: virtual environment with $("$candidate" --version)"; "$candidate" -m venv "$VENV"; }
    echo "set-up 2/3: Python packages (about two minutes; torch with its GPU libraries takes 6 GB)"
    (
        "$VENV/bin/pip" install -q -c constraints.txt setuptools wheel ninja numpy torch py-cpuinfo hjson einops msgpack psutil pydantic tqdm
        "$VENV/bin/pip" install -q -c constraints.txt --no-build-isolation -e '.[train,eval,serve,demo,test]'
    ) >"$VENV/setup.log" 2>&1 &
    installing=$!
    while kill -0 $installing 2>/dev/null; do
        sleep 1
        (( (SECONDS - started) % 15 )) || echo "  $((SECONDS - started)) s, $(du -sm "$VENV" | cut -f1) MB installed"
    done
    wait $installing || { tail -20 "$VENV/setup.log"; echo "error: packages could not be installed; the log is .venv/setup.log" >&2; exit 1; }
    echo "set-up 3/3: compiled kernels"
    VISUALRWKV_KERNELS=0 "$VENV/bin/python" -m visualrwkv.ops.build || echo "  no compiler: the pure torch forms of the recurrences will run, slower"
    # DeepSpeed compiles what it talks through on a CPU when it first needs it, which takes half a minute and 3 GB: now, then.
    [[ "$(nvidia-smi -L 2>/dev/null)" ]] || DS_ACCELERATOR=cpu PATH=$VENV/bin:$PATH python -c 'from visualrwkv.training.engine import compile_once as build; build()' \
        >>"$VENV/setup.log" 2>&1 || echo "  DeepSpeed will compile its own part when training first starts"
    echo "$stamp" >"$VENV/.stamp"
    echo "set-up done in $((SECONDS - started)) s"
fi
export PATH=$VENV/bin:$PATH

# How training starts: RANKS processes under DeepSpeed's launcher, by default one for each GPU; or those of all machines that
# HOSTFILE names (lines of "name slots=8"; each has this checkout at the same place and lets the first one in by ssh).
RANKS=${RANKS:-$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)}
LAUNCH=(python -m)
if [[ "${HOSTFILE:-}" ]]; then
    LAUNCH=(deepspeed --hostfile "$HOSTFILE" --module)
elif (( RANKS > 1 )); then
    # They meet at a port of their own, below those that the system hands out, so that two runs do not meet.
    port=${MASTER_PORT:-$((20000 + RANDOM % 12000))}
    LAUNCH=(deepspeed --num_accelerators "$RANKS" --master_port "$port" --module)
fi
