// The CPU kernels for module.cpp: one table of functions for each instruction set that cpu.cpp is compiled for.
#pragma once

#include "core/tensor.h"

namespace ncsr {

// Every function uses at most `threads` threads.
struct CpuKernels {
    void (*elementwise_forward)(const Elementwise&, bool float64, int threads);
    void (*elementwise_backward)(const Elementwise&, bool float64, int threads);
    void (*flow_step_forward)(const FlowStep&, bool float64, int threads);
    void (*flow_step_backward)(const FlowStep&, bool float64, int threads);
    void (*inverse_logdet)(const InverseLogdet&, int threads);
    void (*fold_forward)(const Fold&, int threads);
    void (*fold_backward)(const Fold&, int threads);
    void (*step_network_forward)(const StepNetwork&, bool float64, int threads);
    void (*conv3x3_forward)(const Conv3x3&, bool float64, int threads);
    void (*conv3x3_gradient)(const Conv3x3&, bool float64, int threads);
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
