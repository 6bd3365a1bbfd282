// ncsr_fast._native: the compiled kernels as Python functions of pointers, strides and sizes. Nothing is checked here: what
// calls them, ncsr_fast/ops/_native.py, has checked every shape, dtype and device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "cpu/cpu.h"
#include "cuda/cuda.h"

namespace py = pybind11;
using namespace ncsr;

namespace {

// pointer, dtype, four strides
using TensorTuple = std::array<int64_t, 6>;
// batch, channels, height, width
using SizesTuple = std::array<int64_t, 4>;

// Where to run: on the CPU with so many threads, or on a stream of the CUDA device of an ordinal, with a workspace. The
// kernels' own CUDA runtime may have another current device than torch's.
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
// CUDA or not, threads or the ordinal, stream, workspace
using WhereTuple = std::array<int64_t, 4>;

Tensor tensor(const TensorTuple& t) { return {reinterpret_cast<char*>(t[0]), Dtype(t[1]), t[2], t[3], t[4], t[5]}; }

PerSample one_per_sample(const TensorTuple& t) { return {reinterpret_cast<const char*>(t[0]), t[2]}; }

Sizes sizes(const SizesTuple& s) { return {s[0], s[1], s[2], s[3]}; }

char* pointer(int64_t address) { return reinterpret_cast<char*>(address); }

const CpuKernels* find(const std::string& isa) {
#if defined(NCSR_X86)
    // what setup.py compiles each build for; every processor with AVX2 has F16C
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    if (isa == "avx512" && has_avx2 && has_avx512) return &avx512::kernels;
    if (isa == "avx2" && has_avx2) return &avx2::kernels;
#endif
    return isa == "baseline" ? &baseline::kernels : nullptr;
}

// Builds of the CPU kernels that this processor can run, the widest first.
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

void pointwise_forward(bool gaussian, SizesTuple size, int64_t kept, double eps, bool inverse, TensorTuple x, TensorTuple h,
                       TensorTuple y, int64_t logdet, bool float64, WhereTuple where) {
    Pointwise p{};
    p.map = gaussian ? Map::gaussian : Map::affine;
    p.size = sizes(size), p.kept = kept, p.eps = eps, p.inverse = inverse;
    p.x = tensor(x), p.h = tensor(h), p.y = tensor(y), p.logdet = pointer(logdet);
    const Where w(where);
    py::gil_scoped_release release;
#if defined(NCSR_CUDA)
    if (w.cuda) return cuda::pointwise_forward(p, float64, w.workspace, w.stream);
#endif
    cpu->pointwise_forward(p, float64, w.threads);
}

void pointwise_backward(bool gaussian, SizesTuple size, int64_t kept, double eps, bool inverse, TensorTuple dy,
                        TensorTuple dlogdet, TensorTuple x, TensorTuple h, TensorTuple dx, TensorTuple dh, bool float64,
                        WhereTuple where) {
    Pointwise p{};
    p.map = gaussian ? Map::gaussian : Map::affine;
    p.size = sizes(size), p.kept = kept, p.eps = eps, p.inverse = inverse;
    p.dy = tensor(dy), p.dlogdet = one_per_sample(dlogdet), p.x = tensor(x), p.h = tensor(h), p.dx = tensor(dx),
    p.dh = tensor(dh);
    const Where w(where);
    py::gil_scoped_release release;
#if defined(NCSR_CUDA)
    if (w.cuda) return cuda::pointwise_backward(p, float64, w.stream);
#endif
    cpu->pointwise_backward(p, float64, w.threads);
}

void flow_step_forward(SizesTuple size, double eps, bool inverse, TensorTuple x, int64_t mix, int64_t offset, TensorTuple h_pre,
                       TensorTuple h_post, TensorTuple y, int64_t logdet, bool float64, WhereTuple where) {
    FlowStep p{};
    p.size = sizes(size), p.eps = eps, p.inverse = inverse;
    p.x = tensor(x), p.h_pre = tensor(h_pre), p.h_post = tensor(h_post), p.y = tensor(y), p.logdet = pointer(logdet);
    p.mix = pointer(mix), p.offset = pointer(offset);
    const Where w(where);
    py::gil_scoped_release release;
#if defined(NCSR_CUDA)
    if (w.cuda) return cuda::flow_step_forward(p, float64, w.workspace, w.stream);
#endif
    cpu->flow_step_forward(p, float64, w.threads);
}

void flow_step_backward(SizesTuple size, double eps, bool inverse, TensorTuple dy, TensorTuple dlogdet, TensorTuple x,
                        TensorTuple y, int64_t mix, TensorTuple h_pre, TensorTuple h_post, TensorTuple dx, int64_t dmix,
                        int64_t doffset, TensorTuple dh_pre, TensorTuple dh_post, bool float64, WhereTuple where) {
    FlowStep p{};
    p.size = sizes(size), p.eps = eps, p.inverse = inverse;
    p.dy = tensor(dy), p.dlogdet = one_per_sample(dlogdet), p.x = tensor(x), p.y = tensor(y), p.mix = pointer(mix);
    p.h_pre = tensor(h_pre), p.h_post = tensor(h_post), p.dx = tensor(dx), p.dmix = pointer(dmix), p.doffset = pointer(doffset);
    p.dh_pre = tensor(dh_pre), p.dh_post = tensor(dh_post);
    const Where w(where);
    py::gil_scoped_release release;
#if defined(NCSR_CUDA)
    if (w.cuda) return cuda::flow_step_backward(p, float64, w.workspace, w.stream);
#endif
    cpu->flow_step_backward(p, float64, w.threads);
}

// count matrices of channels × channels doubles.
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

// sizes: batch, rows, columns, kept, hidden, outputs; w1 may be 0. On the CPU only.
void network_forward(std::array<int64_t, 6> sizes, TensorTuple x, TensorTuple pre, int64_t w1, int64_t w2, int64_t b2,
                     int64_t w3, int64_t b3, TensorTuple h1, TensorTuple h2, TensorTuple y, bool float64, WhereTuple where) {
    const auto [batch, rows, columns, kept, hidden, outputs] = sizes;
    Network p{batch, rows, columns, kept, hidden, outputs, tensor(x), tensor(pre), tensor(y), tensor(h1), tensor(h2)};
    p.w1 = pointer(w1), p.w2 = pointer(w2), p.b2 = pointer(b2), p.w3 = pointer(w3), p.b3 = pointer(b3);
    py::gil_scoped_release release;
    cpu->network_forward(p, float64, Where(where).threads);
}

// sizes: batch, rows and columns of x and of y, inputs, outputs; strides: of the weight, from a 3×3 to the next
Convolution convolution(const std::array<int64_t, 7>& sizes, bool copies, TensorTuple x, std::array<int64_t, 2> strides) {
    Convolution p{};
    std::tie(p.batch, p.x_rows, p.x_columns, p.rows, p.columns, p.inputs, p.outputs) = std::tuple_cat(sizes);
    p.copies = copies, p.x = tensor(x), p.by_output = strides[0], p.by_input = strides[1];
    return p;
}

// bias may be 0. On the CPU only.
void convolution_forward(const std::array<int64_t, 7>& sizes, bool copies, TensorTuple x, int64_t weight,
                         std::array<int64_t, 2> strides, int64_t bias, double slope, TensorTuple gate, int64_t gated,
                         bool transposed, bool accumulate, TensorTuple y, bool float64, WhereTuple where) {
    Convolution p = convolution(sizes, copies, x, strides);
    p.y = tensor(y), p.weight = pointer(weight), p.bias = pointer(bias);
    p.slope = slope, p.gate = tensor(gate), p.gated = gated, p.transposed = transposed, p.accumulate = accumulate;
    py::gil_scoped_release release;
    cpu->convolution_forward(p, float64, Where(where).threads);
}

// Writes dweight and dbias. On the CPU only.
void convolution_gradient(const std::array<int64_t, 7>& sizes, bool copies, TensorTuple x, TensorTuple dy, int64_t dweight,
                          std::array<int64_t, 2> strides, int64_t dbias, bool float64, WhereTuple where) {
    Convolution p = convolution(sizes, copies, x, strides);
    p.dy = tensor(dy), p.dweight = pointer(dweight), p.dbias = pointer(dbias);
    py::gil_scoped_release release;
    cpu->convolution_gradient(p, float64, Where(where).threads);
}

#if defined(NCSR_CUDA)
std::string cuda_unavailable() { return cuda::unavailable(); }

int64_t pointwise_workspace(SizesTuple size) {
    Pointwise p{};
    p.size = sizes(size);
    return cuda::pointwise_workspace(p);
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

int64_t pointwise_workspace(SizesTuple) { return 0; }
int64_t flow_step_workspace(SizesTuple, bool, bool) { return 0; }
int64_t inverse_logdet_workspace(int64_t, int64_t) { return 0; }
#endif

// Calls `use` with a pointer of a tensor's C++ type: float32 or float64.
template <class Use>
void with_parameter(const TensorTuple& t, Use use) {
    Dtype(t[1]) == Dtype::float64 ? use(reinterpret_cast<double*>(t[0])) : use(reinterpret_cast<float*>(t[0]));
}

// A matrix, or a vector as its one row, as doubles.
std::vector<double> doubles(const TensorTuple& t, int64_t rows, int64_t columns) {
    std::vector<double> values(static_cast<size_t>(rows * columns));
    with_parameter(t, [&](const auto* from) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j) values[size_t(i * columns + j)] = double(from[i * t[2] + j * t[3]]);
    });
    return values;
}

void write(const TensorTuple& t, const std::vector<double>& values) {
    with_parameter(t, [&](auto* to) { std::copy(values.begin(), values.end(), to); });
}

// Writes mix and offset (dense); returns the log-det of a pixel, if it was asked for, and the condition number.
std::pair<double, double> fold_forward(int64_t n, TensorTuple bias, TensorTuple logs, TensorTuple weight, bool inverse,
                                       bool logdet, TensorTuple mix, TensorTuple offset) {
    py::gil_scoped_release release;
    const Folded f = cpu->fold(doubles(bias, 1, n), doubles(logs, 1, n), doubles(weight, n, n), inverse, logdet);
    write(mix, f.mix);
    write(offset, f.offset);
    return {f.logdet_of_pixel, f.condition};
}

// Writes dbias, dlogs and dweight (dense).
void fold_backward(int64_t n, TensorTuple bias, TensorTuple logs, TensorTuple weight, bool inverse, TensorTuple dmix,
                   TensorTuple doffset, double g, TensorTuple dbias, TensorTuple dlogs, TensorTuple dweight) {
    py::gil_scoped_release release;
    const FoldGradient d = cpu->fold_gradient(doubles(bias, 1, n), doubles(logs, 1, n), doubles(weight, n, n),
                                              doubles(dmix, n, n), doubles(doffset, 1, n), g, inverse,
                                              Dtype(weight[1]) == Dtype::float32);
    write(dbias, d.bias);
    write(dlogs, d.logs);
    write(dweight, d.weight);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Compiled kernels of ncsr_fast; called by ncsr_fast.ops";
    m.attr("build_info") = NCSR_BUILD_INFO;
    m.def("cuda_unavailable", &cuda_unavailable, "why CUDA tensors cannot be taken, or nothing");
    m.def("instruction_sets", &instruction_sets, "CPU builds this processor can run, the widest first");
    m.def("instruction_set", [] { return current; }, "the CPU build in use");
    m.def("use_instruction_set", &use_instruction_set, "choose another CPU build, for tests");
    m.def("pointwise_workspace", &pointwise_workspace, "bytes of a forward call on a CUDA device");
    m.def("flow_step_workspace", &flow_step_workspace, "bytes of a call on a CUDA device");
    m.def("inverse_logdet_workspace", &inverse_logdet_workspace, "bytes of a call on a CUDA device");
    m.def("pointwise_forward", &pointwise_forward);
    m.def("pointwise_backward", &pointwise_backward);
    m.def("flow_step_forward", &flow_step_forward);
    m.def("flow_step_backward", &flow_step_backward);
    m.def("inverse_logdet", &inverse_logdet);
    m.def("network_forward", &network_forward);
    m.def("convolution_forward", &convolution_forward);
    m.def("convolution_gradient", &convolution_gradient);
    m.def("fold_forward", &fold_forward);
    m.def("fold_backward", &fold_backward);
}
