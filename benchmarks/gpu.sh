#!/usr/bin/env bash
# Everything this library can check and measure on a machine with a GPU, in calls of less than 10 minutes each.
#   benchmarks/gpu.sh build|tests|operators|sampling|training|trainer|demo RESULTS_FOLDER [CHECKOUT_OF_THE_PUBLISHED_NCSR]
# `trainer` reads the photographs in NCSR_IMAGES.
# `build` installs the package with its CUDA kernels; each of the others needs it to have run on that machine before.
# Needs torch with CUDA, triton, nvcc, pybind11, ninja, pytest, scikit-image, safetensors and tqdm; fetches nothing. No
# figure of it is in the README until it has been run.
set -euo pipefail
what=$1
results=$(mkdir -p "$2" && cd "$2" && pwd)
checkout=${3:+$(cd "$3" && pwd)}
published=${checkout:+--published $checkout}
repository=$(cd "$(dirname "$0")/.." && pwd)
cd "$results" # so that what is imported is what was installed
case $what in
  build)
    NCSR_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} \
      python3 -m pip install --no-build-isolation --no-deps "$repository" 2>&1 | tee build.txt
    ncsr-fast doctor | tee doctor.txt
    # one pass through each backend before anything else: two CUDA runtimes share this process
    python3 -m pytest -x -q -c "$repository/pyproject.toml" "$repository/tests/ops/test_operators.py" -k "cuda and values" | tee smoke.txt
    # no host synchronisation, capture in CUDA graphs, the same results as without
    python3 -m pytest -q -c "$repository/pyproject.toml" "$repository/tests/engine/test_synchronization.py" | tee graphs.txt
    ;;
  tests) NCSR_PUBLISHED=$checkout python3 -m pytest -c "$repository/pyproject.toml" "$repository/tests" | tee tests.txt ;;
  operators) ncsr-fast bench --device cuda --out . | tee operators.txt ;;
  sampling)
    python3 -m ncsr_fast.benchmarks.end_to_end $published --device cuda --tasks sample --out . | tee sampling.txt
    python3 -m ncsr_fast.benchmarks.end_to_end $published --device cuda --tasks sample-div2k --rounds 3 --out div2k | tee div2k.txt
    ;;
  training)
    python3 -m ncsr_fast.benchmarks.end_to_end $published --device cuda --tasks train train-batch-18 --out . | tee training.txt
    python3 -m ncsr_fast.benchmarks.end_to_end $published --device cuda --tasks train-batch-18 --tf32 --out tf32 | tee tf32.txt
    ;;
  trainer) # the published one needs natsort and imageio too
    python3 -m ncsr_fast.benchmarks.training "$NCSR_IMAGES" $published --device cuda --bf16 --tasks steps loader resume --batch 18 \
      --rounds 20 --out . | tee trainer.txt
    ;;
  demo) ncsr-fast demo --device cuda --out demo | tee demo.txt ;;
  *) echo "gpu.sh: $what is none of build, tests, operators, sampling, training, trainer, demo" >&2; exit 2 ;;
esac
