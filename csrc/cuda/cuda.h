// The CUDA kernels for module.cpp. A workspace is device memory for partial results.
#pragma once

#include "core/tensor.h"

namespace ncsr::cuda {

int64_t elementwise_workspace(const Elementwise&);                          // bytes, forward
int64_t flow_step_workspace(const FlowStep&, bool float64, bool backward);  // bytes
int64_t inverse_logdet_workspace(int64_t count, int64_t channels);          // bytes

// Makes the device of this ordinal the current one of the calling thread; throws as a launch does.
void use_device(int ordinal);

// Launches on a stream of the current device; a failure throws std::runtime_error with CUDA's message.
void elementwise_forward(Elementwise, bool float64, void* workspace, void* stream);
void elementwise_backward(Elementwise, bool float64, void* stream);
void flow_step_forward(FlowStep, bool float64, void* workspace, void* stream);
void flow_step_backward(FlowStep, bool float64, void* workspace, void* stream);
void inverse_logdet(const InverseLogdet&, void* workspace, void* stream);

// The reason why there is no CUDA device, or nothing. Asks the driver, not a GPU.
const char* unavailable();

}  // namespace ncsr::cuda
