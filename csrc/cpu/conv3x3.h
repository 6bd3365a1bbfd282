// The 3×3 convolution with zero padding by Winograd's minimal filtering (cpu/conv3x3_transforms.h):
//
//   Y = Aᵀ [ Σ_inputs (G g Gᵀ) ⊙ (Bᵀ d B) ] A
//
// Each position of a transformed tile is a product of matrices, (tiles × inputs)·(inputs × outputs), with outputs in the lanes
// of vectors and inputs read one number at a time.
//
// An output is summed over the inputs in one order, however the tiles are divided: the same input gives the same bits whatever
// the number of threads.
#pragma once

#include "cpu/conv3x3_transforms.h"

namespace ncsr::NCSR_ISA {

template <class Line, class T>
class WinogradKernel {
    using V = typename Vector<T>::type;
    static constexpr int points = Line::positions * Line::positions;
    static constexpr int64_t L = Vector<T>::length, width = 2 * L;  // outputs of a panel
    // Rows of the sums, of 2 vectors each, in registers: 24 of 32, or 12 of 16.
#if defined(__AVX512F__)
    static constexpr int high = 12;
#else
    static constexpr int high = 6;
#endif
    static constexpr int64_t unit = 4;  // tiles are multiplied in multiples of `unit`; results beyond the last tile are unused
    static constexpr int64_t most_block = 24;  // tiles of a block, whose products with a panel fit in the first two caches
    // Bytes that a thread reads again and again, the transformed inputs of a block of tiles or the weights of some outputs:
    // 192 KB with AVX2 and 384 KB with AVX-512, three eighths of the usual second-level cache, which two hardware threads may
    // share. Bytes that all threads read, from the third-level cache: of weights or of tiles. At least some 400 tiles, since
    // the weights are transformed once more for every chunk of tiles.
    static constexpr int64_t most_own = 6144 * vector_bytes, most_shared = 12582912, least_tiles = 400;

    const Conv3x3& p_;
    ImageTiles<Line> tiles_;
    int64_t panels_, block_;  // panels of the outputs; tiles of a block

  public:
    WinogradKernel(const Conv3x3& p) : p_(p), tiles_(p) {
        panels_ = (p.outputs + width - 1) / width;
        block_ = std::min(most_block, most_own / bytes(inputs(p.inputs, 1)) / unit * unit);
    }

    void run(int threads) {
        if (block_ > 0 && bytes(panels_ * weights(p_.inputs)) <= most_shared) return by_tiles(threads);
        block_ = most_block;
        by_outputs(threads);
    }

  private:
    static int64_t bytes(int64_t elements) { return elements * int64_t(sizeof(T)); }
    int64_t macs() const { return points * tiles_.count * p_.inputs * p_.outputs; }
    // Elements of a panel's transformed weights, and of a block's inputs and products. One vector more for each position, lest
    // all positions map to the same lines of a cache.
    static int64_t weights(int64_t inner) { return points * (inner * width + L); }
    static int64_t inputs(int64_t inner, int64_t block) { return points * (padded<T>(inner) * block + L); }
    int64_t products() const { return points * (width * block_ + L); }
    Transformed<T> transformed_inputs(T* data, int64_t inner) const {
        return {data, padded<T>(inner) * block_ + L, block_ * L, L};
    }

    // Few weights: all are transformed once, and each thread takes some of the tiles, whose inputs stay in the thread's cache.
    void by_tiles(int threads) const {
        using Shared = Scratch<T, 1>;
        const int64_t inner = p_.inputs, size = Shared::rounded(weights(inner)), some = 32, parts = (inner + some - 1) / some;
        T* u = Shared(panels_ * size).take(0);
        parallel(panels_ * parts, 8 * inner * p_.outputs, threads, [&](int64_t item) {
            const int64_t panel = item / parts, begin = item % parts * some;
            pack(panel, begin, std::min(inner, begin + some), u + panel * size + begin * width, inner);
        });
        const int64_t units = (tiles_.count + unit - 1) / unit, ranges = std::min<int64_t>(threads, units);
        parallel(ranges, macs() / 20, threads, [&](int64_t range) {
            using Buffer = Scratch<T>;
            Buffer scratch(Buffer::rounded(inputs(inner, block_)) + Buffer::rounded(products()));
            const Transformed<T> v = transformed_inputs(scratch.take(inputs(inner, block_)), inner);
            T* z = scratch.take(products());
            const int64_t end = std::min(tiles_.count, (range + 1) * units / ranges * unit);
            for (int64_t first = range * units / ranges * unit; first < end; first += block_) {
                const int64_t count = std::min(block_, end - first);
                transform_input(p_, tiles_, first, count, 0, inner, v);
                for (int64_t panel = 0; panel < panels_; ++panel) {
                    multiply_tiles(count, inner, v, u + panel * size, z, false);
                    write(panel, first, count, z);
                }
            }
        });
    }

    // Many weights: the transformed inputs are shared, and each thread takes some of the outputs and transforms their weights,
    // for as many inputs as fit in the second-level cache while the tiles come from the third. The products are added up over
    // the inputs in shared memory.
    void by_outputs(int threads) const {
        const int64_t most_inner = std::max(L, most_own / bytes(points * width) / L * L);
        const int64_t inner = padded<T>(divided(p_.inputs, divided(p_.inputs, most_inner))), blocks = divided(p_.inputs, inner);
        const int64_t group = std::max<int64_t>(1, most_own * 3 / 4 / bytes(weights(inner))), groups = divided(panels_, group);
        using Shared = Scratch<T, 1>;
        const int64_t size_v = Shared::rounded(inputs(inner, block_)), size_z = blocks > 1 ? Shared::rounded(products()) : 0;
        const int64_t all = divided(tiles_.count, block_), each = size_v + panels_ * size_z;
        const int64_t chunk = std::min(all, std::max(divided(least_tiles, block_), most_shared / bytes(each)));
        Shared shared(chunk * each);
        T *v = shared.take(0), *sums = v + chunk * size_v;
        for (int64_t start = 0; start < all; start += chunk) {
            const int64_t here = std::min(chunk, all - start);
            // ranges of tiles, for about two items a thread, unless the outputs divide evenly: every item transforms weights
            const bool even = groups >= 4 * threads || groups % threads == 0;
            const int64_t ranges = std::min<int64_t>(here, even ? 1 : (2 * threads + groups - 1) / groups);
            for (int64_t k = 0; k < blocks; ++k) {
                const int64_t begin = k * inner, end = std::min(p_.inputs, begin + inner), wide = end - begin;
                parallel(here, points * here * block_ * wide, threads, [&](int64_t item) {
                    const int64_t first = (start + item) * block_, count = std::min(block_, tiles_.count - first);
                    transform_input(p_, tiles_, first, count, begin, end, transformed_inputs(v + item * size_v, wide));
                });
                parallel(groups * ranges, macs() / 20, threads, [&](int64_t item) {
                    const int64_t panel = item / ranges * group, panels = std::min(group, panels_ - panel);
                    const int64_t range = item % ranges;
                    using Buffer = Scratch<T>;
                    const int64_t size_u = Buffer::rounded(weights(wide));
                    Buffer scratch(panels * size_u + Buffer::rounded(products()));
                    T *u = scratch.take(0), *own = u + panels * size_u;
                    for (int64_t i = 0; i < panels; ++i) pack(panel + i, begin, end, u + i * size_u, wide);
                    for (int64_t b = range * here / ranges; b < (range + 1) * here / ranges; ++b) {
                        const int64_t first = (start + b) * block_, count = std::min(block_, tiles_.count - first);
                        for (int64_t i = 0; i < panels; ++i) {
                            T* z = blocks > 1 ? sums + (b * panels_ + panel + i) * size_z : own;
                            multiply_tiles(count, wide, transformed_inputs(v + b * size_v, wide), u + i * size_u, z, k > 0);
                            if (k == blocks - 1) write(panel + i, first, count, z);
                        }
                    }
                });
            }
        }
    }

    // a / b, rounded up, at least 1.
    static int64_t divided(int64_t a, int64_t b) { return std::max<int64_t>(1, (a + b - 1) / b); }

    // G g Gᵀ of a panel of outputs and the inputs [begin, end): a row of the panel for each input, `inner` rows a position.
    void pack(int64_t panel, int64_t begin, int64_t end, T* to, int64_t inner) const {
        constexpr int64_t some = 8;  // inputs, gathered before they are read as vectors
        alignas(64) T taps[some * 9 * L];
        const int64_t position = inner * width + L;
        for (int64_t j = 0; j < width; j += L) {
            const int64_t first = panel * width + j, columns = std::max<int64_t>(0, std::min(L, p_.outputs - first));
            if (columns < L) std::fill(taps, taps + some * 9 * L, T(0));
            for (int64_t k = begin; k < end; k += some) {
                const int64_t count = std::min(some, end - k);
                for (int64_t c = 0; c < columns; ++c) {
                    const T* from = reinterpret_cast<const T*>(p_.weight) + (first + c) * p_.by_output + k * p_.by_input;
                    for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 9
                        for (int64_t t = 0; t < 9; ++t) taps[(i * 9 + t) * L + c] = from[i * p_.by_input + t];
                }
                for (int64_t i = 0; i < count; ++i) {
                    const V* g = reinterpret_cast<const V*>(taps + i * 9 * L);
                    V t[Line::positions][3];
#pragma GCC unroll 3
                    for (int s = 0; s < 3; ++s) {  // transposed: rotated by 180°
                        const V line[3] = {g[p_.transposed ? 8 - s : s], g[p_.transposed ? 5 - s : 3 + s],
                                           g[p_.transposed ? 2 - s : 6 + s]};
                        V line_out[Line::positions];
                        Line::weight(line, line_out);
#pragma GCC unroll 6
                        for (int r = 0; r < Line::positions; ++r) t[r][s] = line_out[r];
                    }
                    T* out = to + (k - begin + i) * width + j;
#pragma GCC unroll 6
                    for (int r = 0; r < Line::positions; ++r) {
                        V line_out[Line::positions];
                        Line::weight(t[r], line_out);
#pragma GCC unroll 6
                        for (int s = 0; s < Line::positions; ++s, out += position) *reinterpret_cast<V*>(out) = line_out[s];
                    }
                }
            }
        }
    }

    // The products of a block of tiles with a panel, at all positions.
    void multiply_tiles(int64_t count, int64_t inner, const Transformed<T>& v, const T* u, T* z, bool add) const {
        const int64_t rows = (count + unit - 1) / unit * unit;
        for (int64_t i = 0; i < points; ++i, u += inner * width + L, z += width * block_ + L) {
            const T* from = v.data + i * v.position;
            int64_t row = 0;
            for (; row + high <= rows; row += high) multiply_rows<high>(row, inner, from, v, u, z, add);
            for (; row + high * 2 / 3 <= rows; row += high * 2 / 3) multiply_rows<high * 2 / 3>(row, inner, from, v, u, z, add);
            for (; row + high / 3 <= rows; row += high / 3) multiply_rows<high / 3>(row, inner, from, v, u, z, add);
        }
    }

    // The products of some tiles at one position; the tiles of the next position are prefetched.
    template <int rows>
    void multiply_rows(int64_t row, int64_t inner, const T* v, const Transformed<T>& all, const T* u, T* z, bool add) const {
        Sums<rows, 2, T> sums;
        sums.start(Start::zero, nullptr, 0, nullptr);
        v += row * L, z += row * width;
        if (add) prefetch(z + width * block_ + L, bytes(rows * width));
        for (; inner >= L; inner -= L, v += all.chunk, u += L * width) {
            prefetch(v + all.position, bytes(rows * L));
            sums.add(L, {v, L, 1}, u, width);
        }
        if (inner) sums.add(inner, {v, L, 1}, u, width);
        if (add) sums.add(z, width);  // last, which rounds less than a sum that begins with z
        sums.store(z, width);
    }

    // Writes Aᵀ z A to y, with bias, leaky relu, accumulation and the derivative of a leaky relu.
    void write(int64_t panel, int64_t first, int64_t count, const T* z) const {
        const int64_t position = width * block_ + L;
        const int64_t outputs = std::min(width, p_.outputs - panel * width);
        // the panel's first channel among those of relu_output; negative for channels before them
        const int64_t first_relu = panel * width - (p_.outputs - p_.relu_channels);
        const bool has_relu = p_.relu_channels && first_relu + outputs > 0;
        alignas(64) T bias[width] = {};
        if (p_.bias) std::copy_n(reinterpret_cast<const T*>(p_.bias) + panel * width, outputs, bias);
        tiles_.each(first, count, [&](int64_t tile, int64_t sample, int64_t tile_row, int64_t tile_column) {
            const int64_t row = Line::given * tile_row + Line::first_output;
            const int64_t column = Line::given * tile_column + Line::first_output;
            const Run corner{sample, row, column, 0};
            T* at = address<T>(p_.y, corner, panel * width);
            const T* relu_at = has_relu ? address<const T>(p_.relu_output, corner, first_relu) : nullptr;
            for (int64_t c = 0; c < outputs; c += L) {
                const T* from = z + tile * width + c;
                V t[Line::given][Line::positions];
#pragma GCC unroll 6
                for (int j = 0; j < Line::positions; ++j) {
                    V line[Line::positions], line_out[Line::given];
#pragma GCC unroll 6
                    for (int i = 0; i < Line::positions; ++i)
                        line[i] = *reinterpret_cast<const V*>(from + (Line::positions * i + j) * position);
                    Line::output(line, line_out);
#pragma GCC unroll 4
                    for (int i = 0; i < Line::given; ++i) t[i][j] = line_out[i];
                }
                const V offset = *reinterpret_cast<const V*>(bias + c);
#pragma GCC unroll 4
                for (int i = 0; i < Line::given; ++i) {
                    if (row + i < 0 || row + i >= p_.rows) continue;
                    V line_out[Line::given];
                    Line::output(t[i], line_out);
                    T* to = at + i * p_.y.row + c * p_.y.channel;
                    const T* relu = has_relu ? relu_at + i * p_.relu_output.row + c * p_.relu_output.channel : nullptr;
#pragma GCC unroll 4
                    for (int j = 0; j < Line::given; ++j) {
                        if (column + j < 0 || column + j >= p_.columns) continue;
                        store_output(line_out[j] + offset, to + j * p_.y.column,
                                     has_relu ? relu + j * p_.relu_output.column : nullptr, -first_relu - c, outputs - c);
                    }
                }
            }
        });
    }

    // `relu`, if not null, is the address of relu_output for lane 0; relu_output has the lanes from `first` on.
    NCSR_FUNCTION void store_output(V value, T* to, const T* relu, int64_t first, int64_t channels) const {
        const T slope = T(p_.slope);
        if (slope != T(1) && !p_.relu_channels) value = value < V{} ? slope * value : value;
        if (p_.accumulate) value += load_channels(to, p_.y.channel, channels);
        if (relu && first <= 0) {
            value = load_channels(relu, p_.relu_output.channel, channels) > V{} ? value : slope * value;
        } else if (relu) {
            for (int64_t i = first; i < std::min(channels, L); ++i)
                if (!(relu[i * p_.relu_output.channel] > T(0))) value[i] *= slope;
        }
        if (p_.y.channel == 1 && channels >= L) {
            *reinterpret_cast<V*>(to) = value;
            return;
        }
        for (int64_t i = 0; i < std::min(channels, L); ++i) to[i * p_.y.channel] = value[i];
    }
};

// True where F(4×4, 3×3) has fewer products than F(2×2, 3×3): unless the large tiles reach far beyond a small image.
template <class T>
bool has_large_tiles(const Conv3x3& p) {
    return 36 * ImageTiles<F4x4<T>>(p).count <= 16 * ImageTiles<F2x2<T>>(p).count;
}

template <class T>
void conv3x3_forward(const Conv3x3& p, int threads) {
    if (p.batch == 0 || p.rows == 0 || p.columns == 0 || p.outputs == 0) return;
    if (p.upsample2x)
        p.transposed ? WinogradKernel<Upsample2xGradient<T>, T>(p).run(threads)
                     : WinogradKernel<Upsample2x<T>, T>(p).run(threads);
    else
        has_large_tiles<T>(p) ? WinogradKernel<F4x4<T>, T>(p).run(threads) : WinogradKernel<F2x2<T>, T>(p).run(threads);
}

}  // namespace ncsr::NCSR_ISA
