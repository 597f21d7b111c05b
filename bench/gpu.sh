#!/usr/bin/env bash
# The real target in one script: QLoRA SFT and DPO on an 8B-shaped Llama with random weights, against plain TRL, then merge and
# verify. Without a GPU it runs dry: the same steps on a tiny shape. The last line is one JSON object.
#   bench/gpu.sh [BASE_WITH_A_TOKENIZER]   (default: the SmolLM2 that the tests have pulled)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
exec env PYTHONPATH=. HF_HUB_OFFLINE=1 "$python" bench/gpu.py "${1:-.cache/home/models/smollm2-135m}"
