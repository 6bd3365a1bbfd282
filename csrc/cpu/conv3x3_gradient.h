// The gradient of the weight and the bias of a 3×3 convolution, by the minimal filtering of cpu/conv3x3.h:
//
//   dw = Gᵀ [ Σ_tiles (Bᵀ d B) ⊗ (A dY Aᵀ) ] G        db = Σ_tiles dY
//
// Each position is a product of matrices, (inputs × tiles)·(tiles × outputs), which one thread sums from the first tile to the
// last: the same bits whatever the number of threads, and no partial sums to add up. All threads transform the operands
// before, for as many tiles and outputs as fit in the third-level cache.
#pragma once

#include "cpu/conv3x3.h"

namespace ncsr::NCSR_ISA {

template <class Line, class T>
class WinogradGradientKernel {
    using V = typename Vector<T>::type;
    static constexpr int points = Line::positions * Line::positions;
    static constexpr int64_t L = Vector<T>::length, width = 2 * L;  // outputs of a panel
#if defined(__AVX512F__)
    static constexpr int64_t most_high = 8;
#else
    static constexpr int64_t most_high = 4;
#endif
    static constexpr int high = int(std::min(L, most_high));  // rows of the sums in registers, of 2 vectors each
    // Tiles of an item of the transforms; and most tiles of a block, whose part of a panel (12 KB) and of a vector of inputs
    // (6 KB) fit in the first-level cache together.
    static constexpr int64_t some = 24, most_block = 6144 / vector_bytes / some * some;
    static constexpr int64_t most_shared = 4194304, least_tiles = 480;  // of the operands: most bytes, least tiles
    static constexpr int64_t group = std::max<int64_t>(1, 128 / width);  // panels at a time

    const Conv3x3& p_;
    ImageTiles<Line> tiles_;
    int64_t panels_, chunks_;  // panels of outputs; vectors of inputs
    int64_t blocks_, block_;  // blocks of tiles; tiles of a block, a multiple of `some`
    int64_t v_position_, v_size_;  // elements of a block's transformed inputs: at one position, at all
    int64_t y_position_, y_size_;  // likewise of a block's transformed dY for a group of panels
    int64_t panel_sums_;  // elements of the sums of a panel at a position

  public:
    WinogradGradientKernel(const Conv3x3& p) : p_(p), tiles_(p) {
        panels_ = (p.outputs + width - 1) / width, chunks_ = (p.inputs + L - 1) / L;
        blocks_ = std::max<int64_t>(1, (tiles_.count + most_block - 1) / most_block);
        block_ = std::max(some, ((tiles_.count + blocks_ - 1) / blocks_ + some - 1) / some * some);
        v_position_ = chunks_ * block_ * L + L, v_size_ = points * v_position_;
        y_position_ = std::min(group, panels_) * block_ * width + L, y_size_ = points * y_position_;
        panel_sums_ = chunks_ * L * width;
    }

    void run(int threads) const {
        const int64_t size = (v_size_ + y_size_) * int64_t(sizeof(T)), width_of_sums = std::min(group, panels_);
        const int64_t fit = std::max({least_tiles / block_, most_shared / size, int64_t(1)});
        const int64_t parts = (blocks_ + fit - 1) / fit, most = (blocks_ + parts - 1) / parts;
        using Shared = Scratch<T, 1>;
        const int64_t size_v = Shared::rounded(most * v_size_), size_y = Shared::rounded(most * y_size_);
        const int64_t size_s = Shared::rounded(points * width_of_sums * panel_sums_);
        Shared shared(size_v + size_y + size_s + Shared::rounded((most * block_ / some) * width_of_sums * width));
        T *v = shared.take(0), *y = v + size_v, *sums = y + size_y, *bias = sums + size_s;
        for (int64_t panel = 0; panel < panels_; panel += group) {
            const int64_t panels = std::min(group, panels_ - panel),
                          outputs = std::min(panels * width, p_.outputs - panel * width);
            T* dbias = reinterpret_cast<T*>(p_.dbias) + panel * width;
            std::fill(dbias, dbias + outputs, T(0));
            for (int64_t begin = 0; begin < blocks_; begin += most) {
                const int64_t first = begin * block_, count = std::min(most * block_, tiles_.count - first);
                transform(panel, panels, first, count, v, y, bias, parts > 1 || panel == 0, threads);
                for (int64_t item = 0; item * some < count; ++item)
                    for (int64_t i = 0; i < outputs; ++i) dbias[i] += bias[item * panels * width + i];
                multiply(panels, count, v, y, sums, begin > 0, threads);
            }
            write(panel, panels, sums, threads);
        }
    }

  private:
    void transform(int64_t panel, int64_t panels, int64_t start, int64_t tiles, T* v, T* y, T* bias, bool inputs,
                   int threads) const {
        const int64_t items = (tiles + some - 1) / some;
        parallel(items, points * tiles * (p_.inputs + panels * width) / 8, threads, [&](int64_t item) {
            const int64_t first = item * some, count = std::min(some, tiles - first), block = first / block_,
                          at = first % block_;
            const Transformed<T> to{v + block * v_size_ + at * L, v_position_, block_ * L, L};
            if (inputs) transform_input<Line, T>(p_, tiles_, start + first, count, 0, p_.inputs, to);
            T* y_to = y + block * y_size_ + at * width;
            transform_output(panel, panels, start + first, count, y_to, bias + item * panels * width);
        });
    }

    // A dY Aᵀ of `count` tiles and `panels` panels, and the sums of dY over these tiles.
    void transform_output(int64_t panel, int64_t panels, int64_t first, int64_t count, T* y, T* bias) const {
        std::fill(bias, bias + panels * width, T(0));
        tiles_.each(first, count, [&](int64_t tile, int64_t sample, int64_t tile_row, int64_t tile_column) {
            const Tensor& dy = p_.dy;
            const int64_t row = Line::given * tile_row + Line::first_output;
            const int64_t column = Line::given * tile_column + Line::first_output;
            for (int64_t i = 0; i < panels * width; i += L) {
                const int64_t channel = panel * width + i, channels = p_.outputs - channel;
                const T* from = address<const T>(dy, Run{sample, row, column, 0}, channel);
                V t[Line::positions][Line::given], sum{};
#pragma GCC unroll 4
                for (int c = 0; c < Line::given; ++c) {
                    V d[Line::given], line_out[Line::positions];
                    const bool within = column + c >= 0 && column + c < p_.columns && channels > 0;
#pragma GCC unroll 4
                    for (int r = 0; r < Line::given; ++r) {
                        const bool inside = within && row + r >= 0 && row + r < p_.rows;
                        d[r] = inside ? load_channels(from + r * dy.row + c * dy.column, dy.channel, channels) : V{};
                        sum += d[r];
                    }
                    Line::output_gradient(d, line_out);
#pragma GCC unroll 6
                    for (int r = 0; r < Line::positions; ++r) t[r][c] = line_out[r];
                }
                *reinterpret_cast<V*>(bias + i) += sum;
                T* to = y + i / width * block_ * width + tile * width + i % width;
#pragma GCC unroll 6
                for (int r = 0; r < Line::positions; ++r) {
                    V line_out[Line::positions];
                    Line::output_gradient(t[r], line_out);
#pragma GCC unroll 6
                    for (int c = 0; c < Line::positions; ++c, to += y_position_) *reinterpret_cast<V*>(to) = line_out[c];
                }
            }
        });
    }

    // Adds the products of `count` tiles to the sums, [position][panel][input][width], or starts them.
    void multiply(int64_t panels, int64_t count, const T* v, const T* y, T* sums, bool add, int threads) const {
        const int64_t parts = threads > 8 ? panels : 1;
        parallel(points * parts, points * count * p_.inputs * panels * width / 20, threads, [&](int64_t item) {
            const int64_t position = item % points, part = item / points, begin = part * panels / parts;
            const T *rows = v + position * v_position_, *columns = y + position * y_position_;
            for (int64_t first = 0; first == 0 || first < count; first += block_, rows += v_size_, columns += y_size_) {
                const int64_t here = std::min(block_, count - first);
                const Start how = add || first > 0 ? Start::add : Start::zero;
                for (int64_t panel = begin; panel < (part + 1) * panels / parts; ++panel) {
                    const T* panel_columns = columns + panel * block_ * width;
                    T* to = sums + (position * panels + panel) * panel_sums_;
                    for (int64_t i = 0; i < chunks_ * L; i += high, to += high * width)
                        multiply_rows(here, rows + i / L * block_ * L + i % L, panel_columns, to, how);
                }
            }
        });
    }

    // Adds the products of a block of tiles to the sums of `high` inputs. The next inputs and sums are prefetched.
    void multiply_rows(int64_t tiles, const T* v, const T* y, T* sums_of_rows, Start start) const {
        Sums<high, 2, T> sums;
        sums.start(start, sums_of_rows, width, nullptr);
        prefetch(sums_of_rows + high * width, high * width * int64_t(sizeof(T)));
        constexpr int64_t few = 8;
        for (int64_t begin = 0; begin < tiles; begin += few, v += few * L, y += few * width) {
            prefetch(v + block_ * L, few * vector_bytes);
            sums.add(std::min(few, tiles - begin), {v, 1, L}, y, width);
        }
        sums.store(sums_of_rows, width);
    }

    // Writes Gᵀ sums G to dw.
    void write(int64_t panel, int64_t panels, const T* sums, int threads) const {
        constexpr int64_t together = 8;  // inputs, transformed first, then written as runs of adjacent numbers
        const int64_t position = panels * panel_sums_, items = (p_.inputs + together - 1) / together;
        const int64_t first = panel * width, outputs = std::min(panels * width, p_.outputs - first);
        T* dw = reinterpret_cast<T*>(p_.dweight) + first * p_.by_output;
        parallel(items, p_.inputs * outputs * 4, threads, [&](int64_t item) {
            const int64_t begin = item * together, count = std::min(together, p_.inputs - begin);
            alignas(64) T taps[together * 9 * L];
            for (int64_t c = 0; c < outputs; c += L) {
                for (int64_t i = 0; i < count; ++i) {
                    const T* from = sums + c / width * panel_sums_ + (begin + i) * width + c % width;
                    V t[3][Line::positions], *to = reinterpret_cast<V*>(taps + i * 9 * L);
#pragma GCC unroll 6
                    for (int j = 0; j < Line::positions; ++j) {
                        V line[Line::positions], line_out[3];
#pragma GCC unroll 6
                        for (int r = 0; r < Line::positions; ++r) {
                            const T* at = from + (Line::positions * r + j) * position;
                            line[r] = *reinterpret_cast<const V*>(at);
                            __builtin_prefetch(at + width);  // the next input
                        }
                        Line::weight_gradient(line, line_out);
#pragma GCC unroll 3
                        for (int r = 0; r < 3; ++r) t[r][j] = line_out[r];
                    }
#pragma GCC unroll 3
                    for (int r = 0; r < 3; ++r) Line::weight_gradient(t[r], to + 3 * r);
                }
                for (int64_t j = 0; j < std::min(L, outputs - c); ++j) {
                    T* to = dw + (c + j) * p_.by_output + begin * 9;
                    for (int64_t i = 0; i < count * 9; ++i) to[i] = taps[i * L + j];
                }
            }
        });
    }
};

// Zeros for an image without pixels.
template <class T>
void conv3x3_gradient(const Conv3x3& p, int threads) {
    if (p.outputs == 0) return;
    if (p.upsample2x)
        WinogradGradientKernel<Upsample2x<T>, T>(p).run(threads);
    else if (has_large_tiles<T>(p))
        WinogradGradientKernel<F4x4<T>, T>(p).run(threads);
    else
        WinogradGradientKernel<F2x2<T>, T>(p).run(threads);
}

}  // namespace ncsr::NCSR_ISA
