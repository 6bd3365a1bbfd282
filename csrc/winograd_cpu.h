// 3x3 convolution with zero padding by Winograd's minimal filtering F(2x2, 3x3): for a tile of 2x2 outputs
//
//   Y = Aᵀ [ Σ_inputs (G g Gᵀ) ⊙ (Bᵀ d B) ] A        d: the 4x4 inputs around the tile, g: the 3x3 weights
//
//   Bᵀ = 1  0 -1  0     G =  1   0   0     Aᵀ = 1  1  1  0
//        0  1  1  0         1/2 1/2 1/2         0  1 -1 -1
//        0 -1  1  0         1/2-1/2 1/2
//        0  1  0 -1          0   0   1
//
// so 16 products for each pair of channels instead of 36. The 16 positions are independent products of matrices, (tiles x
// inputs)·(inputs x outputs), with outputs in the lanes of vectors and inputs read one number at a time. The transforms are
// additions of whole vectors of channels; the largest of a sum's terms grows by a few, and with it the rounding.
//
// Every output is summed over the inputs in one order, however the tiles are divided: the same input gives the same bits
// whatever the number of threads.
#pragma once

#include "matrix_cpu.h"

namespace ncsr::NCSR_ISA {

// The 2x2 tiles of all images, numbered row by row, the last ones of odd rows and columns half outside.
struct ImageTiles {
    int64_t down, across, count;
    ImageTiles(const Convolution& p)
        : down((p.rows + 1) / 2), across((p.columns + 1) / 2), count(p.batch * down * across) {}

    // Calls use(i, sample, first row, first column) with `count` tiles from `first` on.
    template <class Use>
    void each(int64_t first, int64_t count, Use use) const {
        int64_t sample = first / (down * across), row = first / across % down, column = first % across;
        for (int64_t i = 0; i < count; ++i) {
            use(i, sample, 2 * row, 2 * column);
            if (++column < across) continue;
            column = 0;
            if (++row < down) continue;
            row = 0, ++sample;
        }
    }
};

// Where the 16 numbers of a tile and a channel are: vectors of channels at data + position·a + chunk·b + tile·c.
template <class T>
struct Transformed {
    T* data;
    int64_t position, chunk, tile;
};

// Some channels of a pixel, at most a vector of them, zeros in the other lanes.
template <class T>
NCSR_FUNCTION typename Vector<T>::type load_channels(const T* from, int64_t stride, int64_t channels) {
    using V = typename Vector<T>::type;
    if (stride == 1 && channels >= Vector<T>::length) return *reinterpret_cast<const V*>(from);
    T some[Vector<T>::length] = {};
    for (int64_t i = 0; i < std::min(channels, Vector<T>::length); ++i) some[i] = from[i * stride];
    return *reinterpret_cast<const V*>(some);
}

// Bᵀ d B of the channels [begin, end) of `count` tiles.
template <class T>
void transform_input(const Convolution& p, const Tensor& x, const ImageTiles& tiles, int64_t first, int64_t count,
                     int64_t begin, int64_t end, const Transformed<T>& to) {
    using V = typename Vector<T>::type;
    constexpr int64_t L = Vector<T>::length;
    tiles.each(first, count, [&](int64_t tile, int64_t sample, int64_t row, int64_t column) {
        const T* at = address<const T>(x, Run{sample, row - 1, column - 1, 0}, begin);
        const bool interior = row > 0 && column > 0 && row + 2 < p.rows && column + 2 < p.columns;
        for (int64_t c = begin; c < end; c += L, at += L * x.channel) {
            V d[4][4], t[4][4];
            if (interior && x.channel == 1 && end - c >= L) {
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j) d[i][j] = *reinterpret_cast<const V*>(at + i * x.row + j * x.column);
            } else {
                for (int i = 0; i < 4; ++i)
                    for (int j = 0; j < 4; ++j) {
                        const int64_t r = row - 1 + i, s = column - 1 + j;
                        const bool inside = r >= 0 && r < p.rows && s >= 0 && s < p.columns;
                        d[i][j] = inside ? load_channels(at + i * x.row + j * x.column, x.channel, end - c) : V{};
                    }
            }
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                t[0][j] = d[0][j] - d[2][j], t[1][j] = d[1][j] + d[2][j];
                t[2][j] = d[2][j] - d[1][j], t[3][j] = d[1][j] - d[3][j];
            }
            T* out = to.data + (c - begin) / L * to.chunk + tile * to.tile;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i, out += 4 * to.position) {
                *reinterpret_cast<V*>(out) = t[i][0] - t[i][2];
                *reinterpret_cast<V*>(out + to.position) = t[i][1] + t[i][2];
                *reinterpret_cast<V*>(out + 2 * to.position) = t[i][2] - t[i][1];
                *reinterpret_cast<V*>(out + 3 * to.position) = t[i][1] - t[i][3];
            }
        }
    });
}

template <class T>
class WinogradKernel {
    using V = typename Vector<T>::type;
    static constexpr int64_t L = Vector<T>::length, width = 2 * L;  // columns of a panel of outputs
    // Rows of sums in registers, by 2 vectors: 24 of 32 registers or 12 of 16.
#if defined(__AVX512F__)
    static constexpr int high = 12;
#else
    static constexpr int high = 6;
#endif
    static constexpr int64_t unit = 4;    // tiles are computed in multiples of it, whatever is beyond the last unused
    static constexpr int64_t block = 24;  // tiles at a time, whose products with a panel stay in the first caches
    // Bytes of transformed weights: of one thread, 256 KB with AVX2 and 512 KB with AVX-512, half of the second-level cache
    // there is (with 672 KB of 512 KB, 2048 -> 320 channels took 2.6 times as long); and of all that every thread reads for
    // every block of tiles, from the third. Beyond that, what the threads share of tiles, but some 400 of them at least, since
    // the weights are transformed once more for every such chunk. With 16 MB of tiles, not 4, 64 -> 2048 channels and back took
    // a sixth to a third longer on one thread of the machine it was measured on, and as long on two.
    static constexpr int64_t most_weights = 8192 * vector_bytes, most_shared_weights = 12582912;
    static constexpr int64_t most_shared = 4194304, least_blocks = 17;

    const Convolution& p_;
    ImageTiles tiles_;
    int64_t panels_, blocks_, inner_;  // of the outputs; of the inputs, of `inner_` channels, the last one narrower

  public:
    WinogradKernel(const Convolution& p) : p_(p), tiles_(p) {
        panels_ = (p.outputs + width - 1) / width;
        const int64_t most = std::max(L, most_weights / (16 * width * int64_t(sizeof(T))) / L * L);
        blocks_ = std::max<int64_t>(1, (p.inputs + most - 1) / most);
        inner_ = padded<T>((p.inputs + blocks_ - 1) / blocks_);
        blocks_ = std::max<int64_t>(1, (p.inputs + inner_ - 1) / inner_);
    }

    void run(int threads) const {
        if (blocks_ == 1 && panels_ * weights(p_.inputs) * int64_t(sizeof(T)) <= most_shared_weights)
            by_tiles(threads);
        else
            by_outputs(threads);
    }

  private:
    int64_t macs() const { return 16 * tiles_.count * p_.inputs * p_.outputs; }
    // Elements of a panel's transformed weights and of a block's inputs and products. One vector more for each position, so
    // that the 16 do not fall on the same lines of a cache.
    static int64_t weights(int64_t inner) { return 16 * (inner * width + L); }
    static int64_t inputs(int64_t inner) { return 16 * (padded<T>(inner) * block + L); }
    static int64_t products() { return 16 * (width * block + L); }
    static Transformed<T> of_inputs(T* data, int64_t inner) { return {data, padded<T>(inner) * block + L, block * L, L}; }

    // Few weights: all are transformed once, each thread takes some of the tiles, whose inputs stay in its own cache.
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
            Buffer scratch(Buffer::rounded(inputs(inner)) + Buffer::rounded(products()));
            const Transformed<T> v = of_inputs(scratch.take(inputs(inner)), inner);
            T* m = scratch.take(products());
            const int64_t end = std::min(tiles_.count, (range + 1) * units / ranges * unit);
            for (int64_t first = range * units / ranges * unit; first < end; first += block) {
                const int64_t count = std::min(block, end - first);
                transform_input(p_, p_.x, tiles_, first, count, 0, inner, v);
                for (int64_t panel = 0; panel < panels_; ++panel) {
                    multiply_tiles(count, inner, v, u + panel * size, m, false);
                    write(panel, first, count, m);
                }
            }
        });
    }

    // Many weights: the inputs are transformed and shared, each thread takes some of the outputs and transforms their weights
    // when it needs them, as many as stay in its second-level cache while the inputs come from the third.
    void by_outputs(int threads) const {
        const int64_t each = int64_t(sizeof(T)) * 16 * (inner_ + (blocks_ > 1 ? panels_ * width : 0)) * block;
        const int64_t all = (tiles_.count + block - 1) / block, chunk = std::max(least_blocks, most_shared / each);
        const int64_t group = std::max<int64_t>(1, most_weights * 3 / 4 / int64_t(sizeof(T)) / weights(inner_));
        const int64_t groups = (panels_ + group - 1) / group;
        using Shared = Scratch<T, 1>;
        const int64_t size_v = Shared::rounded(inputs(inner_)), size_m = blocks_ > 1 ? Shared::rounded(products()) : 0;
        const int64_t most = std::min(chunk, all);
        Shared shared(most * (size_v + panels_ * size_m));
        T *v = shared.take(0), *sums = v + most * size_v;
        for (int64_t start = 0; start < all; start += chunk) {
            const int64_t here = std::min(chunk, all - start);
            // of tiles, for more or less two items a thread, unless the outputs divide well: every item transforms its weights
            const bool even = groups >= 4 * threads || groups % threads == 0;
            const int64_t ranges = std::min<int64_t>(here, even ? 1 : (2 * threads + groups - 1) / groups);
            for (int64_t k = 0; k < blocks_; ++k) {
                const int64_t begin = k * inner_, inner = std::min(p_.inputs, begin + inner_) - begin;
                parallel(here, 16 * here * block * inner, threads, [&](int64_t item) {
                    const int64_t first = (start + item) * block, count = std::min(block, tiles_.count - first);
                    const Transformed<T> to = of_inputs(v + item * size_v, inner);
                    transform_input(p_, p_.x, tiles_, first, count, begin, begin + inner, to);
                });
                parallel(groups * ranges, macs() / 20, threads, [&](int64_t item) {
                    const int64_t panel = item / ranges * group, panels = std::min(group, panels_ - panel);
                    const int64_t range = item % ranges;
                    using Buffer = Scratch<T>;
                    const int64_t size_u = Buffer::rounded(weights(inner));
                    Buffer scratch(panels * size_u + Buffer::rounded(products()));
                    T *u = scratch.take(0), *own = u + panels * size_u;
                    for (int64_t i = 0; i < panels; ++i) pack(panel + i, begin, begin + inner, u + i * size_u, inner);
                    for (int64_t b = range * here / ranges; b < (range + 1) * here / ranges; ++b) {
                        const int64_t first = (start + b) * block, count = std::min(block, tiles_.count - first);
                        for (int64_t i = 0; i < panels; ++i) {
                            T* m = blocks_ > 1 ? sums + (b * panels_ + panel + i) * size_m : own;
                            multiply_tiles(count, inner, of_inputs(v + b * size_v, inner), u + i * size_u, m, k > 0);
                            if (k == blocks_ - 1) write(panel + i, first, count, m);
                        }
                    }
                });
            }
        }
    }

    // G g Gᵀ of a panel of outputs and the inputs [begin, end), a row of the panel for each input; `inner` rows a position.
    void pack(int64_t panel, int64_t begin, int64_t end, T* to, int64_t inner) const {
        constexpr int64_t some = 8;  // inputs, gathered before they are read as vectors
        alignas(64) T taps[some * 9 * L];
        const int64_t by_output = 9 * (p_.transposed ? 1 : p_.inputs), by_input = 9 * (p_.transposed ? p_.outputs : 1);
        const int64_t position = inner * width + L;
        for (int64_t j = 0; j < width; j += L) {
            const int64_t first = panel * width + j, columns = std::max<int64_t>(0, std::min(L, p_.outputs - first));
            if (columns < L) std::fill(taps, taps + some * 9 * L, T(0));
            for (int64_t k = begin; k < end; k += some) {
                const int64_t count = std::min(some, end - k);
                for (int64_t c = 0; c < columns; ++c) {
                    const T* from = reinterpret_cast<const T*>(p_.weight) + (first + c) * by_output + k * by_input;
                    for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 9
                        for (int64_t t = 0; t < 9; ++t) taps[(i * 9 + t) * L + c] = from[i * by_input + t];
                }
                for (int64_t i = 0; i < count; ++i) {
                    const V* g = reinterpret_cast<const V*>(taps + i * 9 * L);
                    V t[4][3];
#pragma GCC unroll 3
                    for (int s = 0; s < 3; ++s) {  // rotated by half a turn when transposed
                        const V g0 = g[p_.transposed ? 8 - s : s], g1 = g[p_.transposed ? 5 - s : 3 + s];
                        const V g2 = g[p_.transposed ? 2 - s : 6 + s];
                        const V outer = T(0.5) * (g0 + g2), middle = T(0.5) * g1;
                        t[0][s] = g0, t[1][s] = outer + middle, t[2][s] = outer - middle, t[3][s] = g2;
                    }
                    T* out = to + (k - begin + i) * width + j;
#pragma GCC unroll 4
                    for (int r = 0; r < 4; ++r, out += 4 * position) {
                        const V outer = T(0.5) * (t[r][0] + t[r][2]), middle = T(0.5) * t[r][1];
                        *reinterpret_cast<V*>(out) = t[r][0];
                        *reinterpret_cast<V*>(out + position) = outer + middle;
                        *reinterpret_cast<V*>(out + 2 * position) = outer - middle;
                        *reinterpret_cast<V*>(out + 3 * position) = t[r][2];
                    }
                }
            }
        }
    }

    // The products of a block of tiles with a panel, at all 16 positions.
    static void multiply_tiles(int64_t count, int64_t inner, const Transformed<T>& v, const T* u, T* m, bool add) {
        const int64_t rows = (count + unit - 1) / unit * unit;
        for (int64_t i = 0; i < 16; ++i, u += inner * width + L, m += width * block + L) {
            const T* from = v.data + i * v.position;
            int64_t row = 0;
            for (; row + high <= rows; row += high) multiply_rows<high>(row, inner, from, u, m, add);
            for (; row + high * 2 / 3 <= rows; row += high * 2 / 3) multiply_rows<high * 2 / 3>(row, inner, from, u, m, add);
            for (; row + high / 3 <= rows; row += high / 3) multiply_rows<high / 3>(row, inner, from, u, m, add);
        }
    }

    template <int M>
    static void multiply_rows(int64_t row, int64_t inner, const T* v, const T* u, T* m, bool add) {
        Sums<M, 2, T> sums;
        sums.start(add ? Start::add : Start::zero, m + row * width, width, nullptr);
        v += row * L;
        for (; inner >= L; inner -= L, v += block * L, u += L * width) sums.add(L, {v, L, 1}, u, width);
        if (inner) sums.add(inner, {v, L, 1}, u, width);
        sums.store(m + row * width, width);
    }

    // Aᵀ m A, and what follows it, to y.
    void write(int64_t panel, int64_t first, int64_t count, const T* m) const {
        constexpr int64_t position = width * block + L;
        const int64_t outputs = std::min(width, p_.outputs - panel * width);
        const int64_t first_gated = panel * width - (p_.outputs - p_.gated);  // of this panel, in the gate; may be below 0
        const bool gated = p_.gated && first_gated + outputs > 0;
        alignas(64) T bias[width] = {};
        if (p_.bias) std::copy_n(reinterpret_cast<const T*>(p_.bias) + panel * width, outputs, bias);
        tiles_.each(first, count, [&](int64_t tile, int64_t sample, int64_t row, int64_t column) {
            const Run corner{sample, row, column, 0};
            T* at = address<T>(p_.y, corner, panel * width);
            const T* gate_at = gated ? address<const T>(p_.gate, corner, first_gated) : nullptr;
            for (int64_t c = 0; c < outputs; c += L) {
                const T* from = m + tile * width + c;
                V t[2][4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    const auto at = [&](int i) { return *reinterpret_cast<const V*>(from + (4 * i + j) * position); };
                    const V sum = at(1) + at(2), difference = at(1) - at(2);
                    t[0][j] = at(0) + sum, t[1][j] = difference - at(3);
                }
                const V offset = *reinterpret_cast<const V*>(bias + c);
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i) {
                    if (row + i >= p_.rows) continue;
                    T* to = at + i * p_.y.row + c * p_.y.channel;
                    const T* gate = gated ? gate_at + i * p_.gate.row + c * p_.gate.channel : nullptr;
                    store_output(t[i][0] + (t[i][1] + t[i][2]) + offset, to, gate, -first_gated - c, outputs - c);
                    if (column + 1 == p_.columns) continue;
                    if (gated) gate += p_.gate.column;
                    store_output(t[i][1] - t[i][2] - t[i][3] + offset, to + p_.y.column, gate, -first_gated - c, outputs - c);
                }
            }
        });
    }

    // The gate, if there is one, holds from lane `open` on.
    NCSR_FUNCTION void store_output(V value, T* to, const T* gate, int64_t open, int64_t channels) const {
        const T slope = T(p_.slope);
        if (slope != T(1) && !p_.gated) value = value < V{} ? slope * value : value;
        if (p_.accumulate) value += load_channels(to, p_.y.channel, channels);
        if (gate && open <= 0) {
            value = load_channels(gate, p_.gate.channel, channels) > V{} ? value : slope * value;
        } else if (gate) {
            for (int64_t i = open; i < std::min(channels, L); ++i)
                if (!(gate[i * p_.gate.channel] > T(0))) value[i] *= slope;
        }
        if (p_.y.channel == 1 && channels >= L) {
            *reinterpret_cast<V*>(to) = value;
            return;
        }
        for (int64_t i = 0; i < std::min(channels, L); ++i) to[i * p_.y.channel] = value[i];
    }
};

template <class T>
void convolution_forward(const Convolution& p, int threads) {
    if (p.batch > 0 && p.rows > 0 && p.columns > 0 && p.outputs > 0) WinogradKernel<T>(p).run(threads);
}

}  // namespace ncsr::NCSR_ISA
