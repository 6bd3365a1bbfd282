// The CPU kernels as module.cpp sees them: one table of functions for each instruction set cpu.cpp was built for.
#pragma once

#include <vector>

#include "core/tensor.h"

namespace ncsr {

using Vector64 = std::vector<double>;
using Matrix = std::vector<double>;  // n × n, rows one after the other

// An actnorm and a 1×1 convolution as one matrix: fold_cpu.h.
struct Folded {
    Matrix mix;
    Vector64 offset;
    double logdet_of_pixel, condition;  // of weight in the ∞-norm, 0 where no inverse was needed
};

struct FoldGradient {
    Vector64 bias, logs;
    Matrix weight;
};

// Threads as torch.get_num_threads() says, at most.
struct CpuKernels {
    void (*pointwise_forward)(const Pointwise&, bool float64, int threads);
    void (*pointwise_backward)(const Pointwise&, bool float64, int threads);
    void (*flow_step_forward)(const FlowStep&, bool float64, int threads);
    void (*flow_step_backward)(const FlowStep&, bool float64, int threads);
    void (*network_forward)(const Network&, bool float64, int threads);
    void (*convolution_forward)(const Convolution&, bool float64, int threads);
    void (*convolution_gradient)(const Convolution&, bool float64, int threads);
    void (*inverse_logdet)(const InverseLogdet&, int threads);
    Folded (*fold)(const Vector64& bias, const Vector64& logs, const Matrix& weight, bool inverse, bool with_logdet);
    FoldGradient (*fold_gradient)(const Vector64& bias, const Vector64& logs, const Matrix& weight, Matrix dmix,
                                  const Vector64& doffset, double g, bool inverse, bool single);
};

namespace baseline {
extern const CpuKernels kernels;
}
#if defined(NCSR_X86)
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
#endif

}  // namespace ncsr
