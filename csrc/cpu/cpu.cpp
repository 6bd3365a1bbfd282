// The CPU kernels for one instruction set. Compiled once for each: NCSR_ISA names it and the namespace everything is in,
// so that the linker keeps the builds of one template apart.
#ifndef NCSR_ISA
#error "compile with -DNCSR_ISA=baseline, avx2 or avx512"
#endif

#include "cpu/cpu.h"

#include "cpu/conv3x3_gradient.h"
#include "cpu/elementwise.h"
#include "cpu/flow_step.h"
#include "cpu/fold.h"
#include "cpu/step_network.h"

namespace ncsr::NCSR_ISA {

template <class T, class M>
void pointwise_forward_of(const Pointwise& p, int threads) {
    p.inverse ? pointwise_forward<T, M, true>(p, threads) : pointwise_forward<T, M, false>(p, threads);
}

template <class T, class M>
void pointwise_backward_of(const Pointwise& p, int threads) {
    p.inverse ? pointwise_backward<T, M, true>(p, threads) : pointwise_backward<T, M, false>(p, threads);
}

template <class T>
void pointwise_forward_as(const Pointwise& p, int threads) {
    p.map == Map::affine ? pointwise_forward_of<T, Affine>(p, threads) : pointwise_forward_of<T, Gaussian>(p, threads);
}

template <class T>
void pointwise_backward_as(const Pointwise& p, int threads) {
    p.map == Map::affine ? pointwise_backward_of<T, Affine>(p, threads) : pointwise_backward_of<T, Gaussian>(p, threads);
}

extern const CpuKernels kernels;
const CpuKernels kernels{
    [](const Pointwise& p, bool float64, int threads) {
        float64 ? pointwise_forward_as<double>(p, threads) : pointwise_forward_as<float>(p, threads);
    },
    [](const Pointwise& p, bool float64, int threads) {
        float64 ? pointwise_backward_as<double>(p, threads) : pointwise_backward_as<float>(p, threads);
    },
    [](const FlowStep& p, bool float64, int threads) {
        if (float64)
            p.inverse ? flow_step_forward<double, true>(p, threads) : flow_step_forward<double, false>(p, threads);
        else
            p.inverse ? flow_step_forward<float, true>(p, threads) : flow_step_forward<float, false>(p, threads);
    },
    [](const FlowStep& p, bool float64, int threads) {
        if (float64)
            p.inverse ? flow_step_backward<double, true>(p, threads) : flow_step_backward<double, false>(p, threads);
        else
            p.inverse ? flow_step_backward<float, true>(p, threads) : flow_step_backward<float, false>(p, threads);
    },
    [](const Network& p, bool float64, int threads) {
        float64 ? network_forward<double>(p, threads) : network_forward<float>(p, threads);
    },
    [](const Convolution& p, bool float64, int threads) {
        float64 ? convolution_forward<double>(p, threads) : convolution_forward<float>(p, threads);
    },
    [](const Convolution& p, bool float64, int threads) {
        float64 ? convolution_gradient<double>(p, threads) : convolution_gradient<float>(p, threads);
    },
    inverse_logdet,
    fold,
    fold_gradient,
};

}  // namespace ncsr::NCSR_ISA
