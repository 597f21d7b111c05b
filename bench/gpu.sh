#!/usr/bin/env bash
# The real target in one script, part by part (bench/gpu_parts.py): single kernels, then QLoRA SFT and DPO on an 8B-shaped
# Llama with random weights, against plain TRL, too little memory, an interruption, and a smaller shape's release.
# With --dry, the same on a CPU and a tiny shape. What a part finds is appended to DIRECTORY/parts.jsonl as soon as it
# ends, however it ends; the last line is one JSON object over all parts in there.
#   bench/gpu.sh [--parts 1-4,7] [--out DIRECTORY] [--tokenizer BASE] [--scratch DIRECTORY] [--keep] [--dry]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
exec env PYTHONPATH=".:bench${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 "$python" bench/gpu.py "$@"
