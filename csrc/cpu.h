// The CPU kernels as module.cpp sees them: one table of functions for each instruction set cpu.cpp was built for.
#pragma once

#include "tensor.h"

namespace ncsr {

// Threads as torch.get_num_threads() says, at most.
struct CpuKernels {
    void (*pointwise_forward)(const Pointwise&, bool float64, int threads);
    void (*pointwise_backward)(const Pointwise&, bool float64, int threads);
    void (*flow_step_forward)(const FlowStep&, bool float64, int threads);
    void (*flow_step_backward)(const FlowStep&, bool float64, int threads);
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
