// The CPU kernels for one instruction set. This file is compiled once for each: NCSR_ISA names the instruction set and the
// namespace of all kernels, so that the linker distinguishes the builds of a template.
#ifndef NCSR_ISA
#error "compile with -DNCSR_ISA=baseline, avx2 or avx512"
#endif

#include "cpu/cpu.h"

#include "core/dispatch.h"
#include "cpu/conv3x3_gradient.h"
#include "cpu/elementwise.h"
#include "cpu/flow_step.h"
#include "cpu/fold.h"
#include "cpu/step_network.h"

namespace ncsr::NCSR_ISA {

extern const CpuKernels kernels;
const CpuKernels kernels{
    [](const Elementwise& p, bool float64, int threads) {
        std::visit(
            [&](auto t, auto map, auto inverse) { elementwise_forward<decltype(t), decltype(map), inverse>(p, threads); },
            scalar(float64), map_type(p.map), direction(p.inverse));
    },
    [](const Elementwise& p, bool float64, int threads) {
        std::visit(
            [&](auto t, auto map, auto inverse) { elementwise_backward<decltype(t), decltype(map), inverse>(p, threads); },
            scalar(float64), map_type(p.map), direction(p.inverse));
    },
    [](const FlowStep& p, bool float64, int threads) {
        std::visit([&](auto t, auto inverse) { flow_step_forward<decltype(t), inverse>(p, threads); }, scalar(float64),
                   direction(p.inverse));
    },
    [](const FlowStep& p, bool float64, int threads) {
        std::visit([&](auto t, auto inverse) { flow_step_backward<decltype(t), inverse>(p, threads); }, scalar(float64),
                   direction(p.inverse));
    },
    inverse_logdet,
    fold_forward,
    fold_backward,
    [](const StepNetwork& p, bool float64, int threads) {
        float64 ? step_network_forward<double>(p, threads) : step_network_forward<float>(p, threads);
    },
    [](const Conv3x3& p, bool float64, int threads) {
        float64 ? conv3x3_forward<double>(p, threads) : conv3x3_forward<float>(p, threads);
    },
    [](const Conv3x3& p, bool float64, int threads) {
        float64 ? conv3x3_gradient<double>(p, threads) : conv3x3_gradient<float>(p, threads);
    },
};

}  // namespace ncsr::NCSR_ISA
