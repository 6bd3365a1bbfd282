#!/usr/bin/env bash
# Everything this library can check and measure on a machine with a GPU, in nine minutes:
#   benchmarks/gpu.sh RESULTS_FOLDER [OPTIONS of python -m ncsr_fast.benchmarks.gpu, their paths absolute]
# It installs the wheel of that machine's Python which `make wheel-gpu` put into wheels/: nothing is compiled, nothing fetched.
# Needs torch with CUDA, triton, safetensors, tqdm and pillow; for the tests pytest, pytest-xdist and scikit-image too.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
results=$(mkdir -p "$1" && cd "$1" && pwd)
export NCSR_FAST_COMMIT=${NCSR_FAST_COMMIT:-$(cat "$repository/wheels/COMMIT")}
python3 -m pip install --quiet --no-index --no-deps --force-reinstall --find-links "$repository/wheels" ncsr_fast
cd "$results" # so that what is imported is what was installed
exec python3 -m ncsr_fast.benchmarks.gpu . --tests "$repository/tests" "${@:2}"
