#!/usr/bin/env bash
# Everything this library can check and measure on a machine with a GPU, in one call of less than 10 minutes.
#   benchmarks/gpu.sh RESULTS_FOLDER [CHECKOUT_OF_THE_PUBLISHED_NCSR]
# Needs torch with CUDA, pytest, scikit-image, safetensors and tqdm; fetches nothing. No figure of it is in the README
# until it has been run.
set -euo pipefail
results=$(mkdir -p "$1" && cd "$1" && pwd)
published=${2:+$(cd "$2" && pwd)}
cd "$(dirname "$0")/.."
python3 -m pip install --quiet --no-build-isolation --no-deps .
cd "$results" # so that what is imported is what was installed
ncsr-fast doctor | tee doctor.txt
python3 -m pytest -c "$OLDPWD/pyproject.toml" "$OLDPWD/tests" | tee tests.txt
ncsr-fast demo --device cuda --out demo | tee demo.txt
if [ -n "$published" ]; then
  python3 "$OLDPWD/benchmarks/end_to_end.py" --published "$published" --device cuda --size 128 --out .
fi
