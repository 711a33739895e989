#!/bin/sh
# Make every reference anew: see README.md. PYTHON has requirements.txt installed; SHARED is the shared material.
set -eu
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
SHARED=$(cd "${SHARED:-../../shared}" && pwd)
"$PYTHON" models/make.py
"$PYTHON" models/quantised.py
"$PYTHON" kv/make.py
"$PYTHON" kv/record.py
"$PYTHON" kv/policies.py
"$PYTHON" demo-model/convert.py "$SHARED/demo-model" demo-model/demo-q8_0.gguf
"$PYTHON" demo-model/measure.py "$SHARED/demo-model" --shakespeare "$SHARED/corpus/shakespeare.txt" \
    --gguf demo-model/demo-q8_0.gguf --llama-cpp
