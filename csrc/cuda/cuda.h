// The CUDA kernels as module.cpp sees them. The workspace is memory of the device for partial sums.
#pragma once

#include "core/tensor.h"

namespace ncsr::cuda {

int64_t pointwise_workspace(const Pointwise&);                           // bytes, forward
int64_t flow_step_workspace(const FlowStep&, bool float64, bool backward);  // bytes
int64_t inverse_logdet_workspace(int64_t count, int64_t channels);          // bytes

// Makes the device of this ordinal the calling thread's current one; throws as a launch does.
void use_device(int ordinal);

// Launches on `stream` of the current device; throws std::runtime_error with CUDA's message.
void pointwise_forward(Pointwise, bool float64, void* workspace, void* stream);
void pointwise_backward(Pointwise, bool float64, void* stream);
void flow_step_forward(FlowStep, bool float64, void* workspace, void* stream);
void flow_step_backward(FlowStep, bool float64, void* workspace, void* stream);
void inverse_logdet(const InverseLogdet&, void* workspace, void* stream);

// Why there is no CUDA device to run on, or nothing. Asks the driver, not a GPU.
const char* unavailable();

}  // namespace ncsr::cuda
