#!/usr/bin/env bash
# A folder with which bench/gpu.sh runs on a machine without a network whose Python 3.12 holds a CUDA build of torch and
# Transformers: the other packages, stripped, and a tokenizer. There:
#   PYTHONPATH=DIRECTORY bench/gpu.sh --tokenizer DIRECTORY/tokenizer
# The folder is made by
#   bench/gpu_carry.sh DIRECTORY [BASE_WITH_A_TOKENIZER]   (default: the SmolLM2 that the tests have pulled)
set -euo pipefail
directory=$1 base=${2:-$(dirname "$0")/../.cache/home/models/smollm2-135m}
platforms=()
for glibc in 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done

rm -rf "$directory"
"${PYTHON:-python3}" -m pip install --disable-pip-version-check -q --no-deps --no-compile --only-binary=:all: \
    --python-version 3.12 --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 --target "$directory" \
    liger-kernel==0.8.5 trl==1.16.0 peft==0.21.2 bitsandbytes==0.50.2 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 \
    pydantic==2.14.4 pydantic-core==2.50.5 typing-extensions typing-inspection annotated-types \
    kitoken==0.11.1 rensa==0.5.0 orjson==3.13.0 tomli-w
find "$directory/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name '*_cuda130.so' ! -name '*_cpu.so' -delete
rm -rf "$directory/bin"
mkdir "$directory/tokenizer"
for file in config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json \
    chat_template.jinja; do
    [ ! -e "$base/$file" ] || cp "$base/$file" "$directory/tokenizer/"
done
du -sh "$directory"
