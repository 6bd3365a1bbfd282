// ncsr_fast._native: the compiled kernels as Python functions of addresses, strides and sizes. Nothing is checked here: the
// caller, ncsr_fast/ops/native.py, passes checked shapes, dtypes and devices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/cpu.h"
#include "cuda/cuda.h"

namespace py = pybind11;
using namespace ncsr;

namespace {

// address, dtype, four strides
using TensorTuple = std::array<int64_t, 6>;
// batch, channels, height, width
using SizesTuple = std::array<int64_t, 4>;

// The place of a call: the CPU and a number of threads, or a CUDA device by its ordinal, a stream and a workspace. The CUDA
// runtime linked into this module may have another current device than torch's.
struct Where {
    bool cuda;
    int threads;
    void *stream, *workspace;
    Where(std::array<int64_t, 4> w)
        : cuda(w[0]), threads(int(w[1])), stream(reinterpret_cast<void*>(w[2])), workspace(reinterpret_cast<void*>(w[3])) {
#if defined(NCSR_CUDA)
        if (cuda) cuda::use_device(int(w[1]));
#endif
    }
};
// 1 for CUDA, threads or ordinal, stream, workspace
using WhereTuple = std::array<int64_t, 4>;

Tensor tensor(const TensorTuple& t) { return {reinterpret_cast<char*>(t[0]), Dtype(t[1]), t[2], t[3], t[4], t[5]}; }

PerSample one_per_sample(const TensorTuple& t) { return {reinterpret_cast<const char*>(t[0]), t[2]}; }

Sizes sizes(const SizesTuple& s) { return {s[0], s[1], s[2], s[3]}; }

char* pointer(int64_t address) { return reinterpret_cast<char*>(address); }

const CpuKernels* find(const std::string& isa) {
#if defined(NCSR_X86)
    // the features that setup.py compiles each build for; every processor with AVX2 has F16C
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    if (isa == "avx512" && has_avx2 && has_avx512) return &avx512::kernels;
    if (isa == "avx2" && has_avx2) return &avx2::kernels;
#endif
    return isa == "baseline" ? &baseline::kernels : nullptr;
}

// Names of the CPU builds that this processor can run, the widest first.
std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const char* isa : {"avx512", "avx2", "baseline"})
        if (find(isa)) names.push_back(isa);
    return names;
}

std::string current = instruction_sets().front();
const CpuKernels* cpu = find(current);

void use_instruction_set(const std::string& isa) {
    const CpuKernels* found = find(isa);
    if (!found) throw std::invalid_argument("this processor or this build has no instruction set '" + isa + "'");
    current = isa;
    cpu = found;
}

void elementwise_forward(Map map, SizesTuple size, int64_t pass_through, double eps, bool inverse, TensorTuple x, TensorTuple h,
                         TensorTuple y, int64_t logdet, bool float64, WhereTuple where) {
    Elementwise p{};
    p.map = map, p.size = sizes(size), p.pass_through = pass_through, p.eps = eps, p.inverse = inverse;
    p.x = tensor(x), p.h = tensor(h), p.y = tensor(y), p.logdet = pointer(logdet);
    const Where w(where);
    py::gil_scoped_release release;
#if defined(NCSR_CUDA)
    if (w.cuda) return cuda::elementwise_forward(p, float64, w.workspace, w.stream);
#endif
    cpu->elementwise_forward(p, float64, w.threads);
}

void elementwise_backward(Map map, SizesTuple size, int64_t pass_through, double eps, bool inverse, TensorTuple dy,
                          TensorTuple dlogdet, TensorTuple x, TensorTuple h, TensorTuple dx, TensorTuple dh, bool float64,
                          WhereTuple where) {
    Elementwise p{};
    p.map = map, p.size = sizes(size), p.pass_through = pass_through, p.eps = eps, p.inverse = inverse;
    p.dy = tensor(dy), p.dlogdet = one_per_sample(dlogdet), p.x = tensor(x), p.h = tensor(h), p.dx = tensor(dx),
    p.dh = tensor(dh);
    const Where w(where);
    py::gil_scoped_release release;
#if defined(NCSR_CUDA)
    if (w.cuda) return cuda::elementwise_backward(p, float64, w.stream);
#endif
    cpu->elementwise_backward(p, float64, w.threads);
}

void flow_step_forward(SizesTuple size, double eps, bool inverse, TensorTuple x, int64_t mix, int64_t offset,
                       TensorTuple h_before, TensorTuple h_after, TensorTuple y, int64_t logdet, bool float64,
                       WhereTuple where) {
    FlowStep p{};
    p.size = sizes(size), p.eps = eps, p.inverse = inverse;
    p.x = tensor(x), p.h_before = tensor(h_before), p.h_after = tensor(h_after), p.y = tensor(y), p.logdet = pointer(logdet);
    p.mix = pointer(mix), p.offset = pointer(offset);
    const Where w(where);
    py::gil_scoped_release release;
#if defined(NCSR_CUDA)
    if (w.cuda) return cuda::flow_step_forward(p, float64, w.workspace, w.stream);
#endif
    cpu->flow_step_forward(p, float64, w.threads);
}

void flow_step_backward(SizesTuple size, double eps, bool inverse, TensorTuple dy, TensorTuple dlogdet, TensorTuple x,
                        TensorTuple y, int64_t mix, TensorTuple h_before, TensorTuple h_after, TensorTuple dx, int64_t dmix,
                        int64_t doffset, TensorTuple dh_before, TensorTuple dh_after, bool float64, WhereTuple where) {
    FlowStep p{};
    p.size = sizes(size), p.eps = eps, p.inverse = inverse;
    p.dy = tensor(dy), p.dlogdet = one_per_sample(dlogdet), p.x = tensor(x), p.y = tensor(y), p.mix = pointer(mix);
    p.h_before = tensor(h_before), p.h_after = tensor(h_after), p.dx = tensor(dx), p.dmix = pointer(dmix),
    p.doffset = pointer(doffset);
    p.dh_before = tensor(dh_before), p.dh_after = tensor(dh_after);
    const Where w(where);
    py::gil_scoped_release release;
#if defined(NCSR_CUDA)
    if (w.cuda) return cuda::flow_step_backward(p, float64, w.workspace, w.stream);
#endif
    cpu->flow_step_backward(p, float64, w.threads);
}

// Dense float64 matrices (count, channels, channels).
void inverse_logdet(int64_t count, int64_t channels, int64_t weight, int64_t inverse, int64_t logdet, int64_t condition, bool,
                    WhereTuple where) {
    const auto doubles = [](int64_t address) { return reinterpret_cast<double*>(address); };
    const InverseLogdet p{count, channels, doubles(weight), doubles(inverse), doubles(logdet), doubles(condition)};
    const Where w(where);
    py::gil_scoped_release release;
#if defined(NCSR_CUDA)
    if (w.cuda) return cuda::inverse_logdet(p, w.workspace, w.stream);
#endif
    cpu->inverse_logdet(p, w.threads);
}

// Stacks of maps of any strides: address, dtype, stride of a map, 0, row stride, column stride.
Fold fold(int64_t count, int64_t channels, bool inverse, TensorTuple bias, TensorTuple logs, TensorTuple weight) {
    Fold p{count, channels, inverse};
    p.bias = tensor(bias), p.logs = tensor(logs), p.weight = tensor(weight);
    return p;
}

// On the CPU only. Writes mix, offset and the log-det of a pixel, which lacks log|det weight| unless it is needed; returns the
// condition numbers of the weights in the ∞-norm, 0 where no inverse is needed.
std::vector<double> fold_forward(int64_t count, int64_t channels, bool inverse, bool needs_logdet, TensorTuple bias,
                                 TensorTuple logs, TensorTuple weight, TensorTuple mix, TensorTuple offset, TensorTuple logdet,
                                 bool, WhereTuple where) {
    Fold p = fold(count, channels, inverse, bias, logs, weight);
    std::vector<double> condition(static_cast<size_t>(count));
    p.needs_logdet = needs_logdet, p.condition = condition.data();
    p.mix = tensor(mix), p.offset = tensor(offset), p.logdet = tensor(logdet);
    py::gil_scoped_release release;
    cpu->fold_forward(p, Where(where).threads);
    return condition;
}

// On the CPU only. Writes dbias, dlogs and dweight.
void fold_backward(int64_t count, int64_t channels, bool inverse, TensorTuple bias, TensorTuple logs, TensorTuple weight,
                   TensorTuple dmix, TensorTuple doffset, TensorTuple dlogdet, TensorTuple dbias, TensorTuple dlogs,
                   TensorTuple dweight, bool, WhereTuple where) {
    Fold p = fold(count, channels, inverse, bias, logs, weight);
    p.dmix = tensor(dmix), p.doffset = tensor(doffset), p.dlogdet = tensor(dlogdet);
    p.dbias = tensor(dbias), p.dlogs = tensor(dlogs), p.dweight = tensor(dweight);
    py::gil_scoped_release release;
    cpu->fold_backward(p, Where(where).threads);
}

// On the CPU only. sizes: batch, rows, columns, pass-through channels, hidden channels, outputs; w1 may be 0.
void step_network_forward(std::array<int64_t, 6> sizes, TensorTuple z1, TensorTuple pre, int64_t w1, int64_t w2, int64_t b2,
                          int64_t w3, int64_t b3, TensorTuple h1, TensorTuple h2, TensorTuple y, bool float64,
                          WhereTuple where) {
    const auto [batch, rows, columns, pass_through, hidden, outputs] = sizes;
    StepNetwork p{batch,      rows,        columns,   pass_through, hidden,    outputs,
                  tensor(z1), tensor(pre), tensor(y), tensor(h1),   tensor(h2)};
    p.w1 = pointer(w1), p.w2 = pointer(w2), p.b2 = pointer(b2), p.w3 = pointer(w3), p.b3 = pointer(b3);
    py::gil_scoped_release release;
    cpu->step_network_forward(p, float64, Where(where).threads);
}

// sizes: batch, rows and columns of x and of y, inputs, outputs; strides: of the weight's 3×3 blocks, by output and by input.
Conv3x3 conv3x3(const std::array<int64_t, 7>& sizes, bool upsample2x, TensorTuple x, std::array<int64_t, 2> strides) {
    Conv3x3 p{};
    std::tie(p.batch, p.x_rows, p.x_columns, p.rows, p.columns, p.inputs, p.outputs) = std::tuple_cat(sizes);
    p.upsample2x = upsample2x, p.x = tensor(x), p.by_output = strides[0], p.by_input = strides[1];
    return p;
}

// On the CPU only. bias may be 0.
void conv3x3_forward(const std::array<int64_t, 7>& sizes, bool upsample2x, TensorTuple x, int64_t weight,
                     std::array<int64_t, 2> strides, int64_t bias, double slope, TensorTuple relu_output, int64_t relu_channels,
                     bool transposed, bool accumulate, TensorTuple y, bool float64, WhereTuple where) {
    Conv3x3 p = conv3x3(sizes, upsample2x, x, strides);
    p.y = tensor(y), p.weight = pointer(weight), p.bias = pointer(bias);
    p.slope = slope, p.relu_output = tensor(relu_output), p.relu_channels = relu_channels, p.transposed = transposed,
    p.accumulate = accumulate;
    py::gil_scoped_release release;
    cpu->conv3x3_forward(p, float64, Where(where).threads);
}

// On the CPU only. Writes dweight and dbias.
void conv3x3_gradient(const std::array<int64_t, 7>& sizes, bool upsample2x, TensorTuple x, TensorTuple dy, int64_t dweight,
                      std::array<int64_t, 2> strides, int64_t dbias, bool float64, WhereTuple where) {
    Conv3x3 p = conv3x3(sizes, upsample2x, x, strides);
    p.dy = tensor(dy), p.dweight = pointer(dweight), p.dbias = pointer(dbias);
    py::gil_scoped_release release;
    cpu->conv3x3_gradient(p, float64, Where(where).threads);
}

#if defined(NCSR_CUDA)
std::string cuda_unavailable() { return cuda::unavailable(); }

int64_t elementwise_workspace(SizesTuple size) {
    Elementwise p{};
    p.size = sizes(size);
    return cuda::elementwise_workspace(p);
}

int64_t flow_step_workspace(SizesTuple size, bool float64, bool backward) {
    FlowStep p{};
    p.size = sizes(size);
    return cuda::flow_step_workspace(p, float64, backward);
}

int64_t inverse_logdet_workspace(int64_t count, int64_t channels) { return cuda::inverse_logdet_workspace(count, channels); }
#else
std::string cuda_unavailable() {
    return "this build has no CUDA kernels (" NCSR_BUILD_INFO
           "); reinstall where there is nvcc: NCSR_FAST_CUDA=1 pip install .";
}

int64_t elementwise_workspace(SizesTuple) { return 0; }
int64_t flow_step_workspace(SizesTuple, bool, bool) { return 0; }
int64_t inverse_logdet_workspace(int64_t, int64_t) { return 0; }
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Compiled kernels of ncsr_fast; called by ncsr_fast.ops";
    m.attr("build_info") = NCSR_BUILD_INFO;
    m.def("cuda_unavailable", &cuda_unavailable, "the reason why CUDA tensors cannot be passed, or nothing");
    m.def("instruction_sets", &instruction_sets, "CPU builds this processor can run, the widest first");
    m.def("instruction_set", [] { return current; }, "the CPU build in use");
    m.def("use_instruction_set", &use_instruction_set, "choose another CPU build, for tests");
    // module_local, since the tests load two builds of this module into one process
    py::enum_<Map>(m, "Map", py::module_local()).value("affine", Map::affine).value("gaussian", Map::gaussian);
    m.def("elementwise_workspace", &elementwise_workspace, "bytes of a forward call on a CUDA device");
    m.def("elementwise_forward", &elementwise_forward);
    m.def("elementwise_backward", &elementwise_backward);
    m.def("flow_step_workspace", &flow_step_workspace, "bytes of a call on a CUDA device");
    m.def("flow_step_forward", &flow_step_forward);
    m.def("flow_step_backward", &flow_step_backward);
    m.def("inverse_logdet_workspace", &inverse_logdet_workspace, "bytes of a call on a CUDA device");
    m.def("inverse_logdet", &inverse_logdet);
    m.def("fold_forward", &fold_forward);
    m.def("fold_backward", &fold_backward);
    m.def("step_network_forward", &step_network_forward);
    m.def("conv3x3_forward", &conv3x3_forward);
    m.def("conv3x3_gradient", &conv3x3_gradient);
}
