// The gradient of the weights of a 3x3 convolution, by the same filtering as winograd_cpu.h:
//
//   dw = Gᵀ [ Σ_tiles (Bᵀ d B) ⊗ (A dY Aᵀ) ] G        db = Σ_tiles of the middle number of A dY Aᵀ, the sum of a tile
//
// 16 products (inputs x tiles)·(tiles x outputs), a position each, whose sums over all tiles are done by one thread from the
// first tile to the last: the same bits whatever the number of threads, and nothing to add up between them. Both operands are
// transformed by all threads before, for as many tiles and outputs as stay in the third-level cache.
#pragma once

#include "winograd_cpu.h"

namespace ncsr::NCSR_ISA {

template <class T>
class WinogradGradientKernel {
    using V = typename Vector<T>::type;
    static constexpr int64_t L = Vector<T>::length, width = 2 * L;  // columns of a panel of outputs
#if defined(__AVX512F__)
    static constexpr int64_t most_high = 8;
#else
    static constexpr int64_t most_high = 4;
#endif
    static constexpr int high = int(std::min(L, most_high));  // rows of sums in registers, by 2 vectors
    // Tiles whose part of a panel (12 KB) and of a vector of inputs (6 KB) are in the first-level cache together, and those of
    // one item of the transforms.
    static constexpr int64_t block = 96, some = 24;
    static constexpr int64_t most_shared = 4194304, least_blocks = 5;     // of the operands in use: bytes, and at least
    static constexpr int64_t group = std::max<int64_t>(1, 128 / width);  // panels at a time

    const Convolution& p_;
    ImageTiles tiles_;
    int64_t panels_, chunks_;              // of the outputs; vectors of inputs
    int64_t v_position_, v_size_;          // elements of a block of tiles at a position and at all, of the inputs
    int64_t y_position_, y_size_;          // and of a group of panels
    int64_t sums_of_panel_;                // elements of the sums of a panel at a position

  public:
    WinogradGradientKernel(const Convolution& p) : p_(p), tiles_(p) {
        panels_ = (p.outputs + width - 1) / width, chunks_ = (p.inputs + L - 1) / L;
        v_position_ = chunks_ * block * L + L, v_size_ = 16 * v_position_;
        y_position_ = std::min(group, panels_) * block * width + L, y_size_ = 16 * y_position_;
        sums_of_panel_ = chunks_ * L * width;
    }

    void run(int threads) const {
        const int64_t all = (tiles_.count + block - 1) / block, size = (v_size_ + y_size_) * int64_t(sizeof(T));
        const int64_t fit = std::max(least_blocks, most_shared / size), parts = (all + fit - 1) / fit;
        const int64_t most = parts ? (all + parts - 1) / parts : 1, width_of_sums = std::min(group, panels_);
        using Shared = Scratch<T, 1>;
        const int64_t size_v = Shared::rounded(most * v_size_), size_y = Shared::rounded(most * y_size_);
        const int64_t size_s = Shared::rounded(16 * width_of_sums * sums_of_panel_);
        Shared shared(size_v + size_y + size_s + Shared::rounded(width_of_sums * width));
        T *v = shared.take(0), *y = v + size_v, *sums = y + size_y, *bias = sums + size_s;
        for (int64_t panel = 0; panel < panels_; panel += group) {
            const int64_t panels = std::min(group, panels_ - panel);
            std::fill(bias, bias + panels * width, T(0));
            for (int64_t begin = 0; begin < all || begin == 0; begin += most) {
                const int64_t blocks = std::min(most, all - begin);
                transform(panel, panels, begin * block, blocks * block, v, y, parts > 1 || panel == 0, threads);
                multiply(panels, begin * block, blocks, v, y, sums, bias, begin > 0, threads);
            }
            write(panel, panels, sums, bias, threads);
        }
    }

  private:
    void transform(int64_t panel, int64_t panels, int64_t start, int64_t tiles, T* v, T* y, bool inputs, int threads) const {
        const int64_t last = std::min(tiles_.count, start + tiles), items = (last - start + some - 1) / some;
        parallel(items, 16 * (last - start) * (p_.inputs + panels * width) / 8, threads, [&](int64_t item) {
            const int64_t first = item * some, count = std::min(some, last - start - first), at = first % block;
            T* to = v + first / block * v_size_ + at * L;
            if (inputs)
                transform_input<T>(p_, p_.x, tiles_, start + first, count, 0, p_.inputs, {to, v_position_, block * L, L});
            transform_output(panel, panels, start + first, count, y + first / block * y_size_ + at * width);
        });
    }

    // A dY Aᵀ of `count` tiles and some panels.
    void transform_output(int64_t panel, int64_t panels, int64_t first, int64_t count, T* y) const {
        tiles_.each(first, count, [&](int64_t tile, int64_t sample, int64_t row, int64_t column) {
            const Tensor& dy = p_.dy;
            const bool below = row + 1 < p_.rows, beside = column + 1 < p_.columns;
            for (int64_t i = 0; i < panels * width; i += L) {
                const int64_t channel = panel * width + i, channels = p_.outputs - channel;
                const T* from = address<const T>(dy, Run{sample, row, column, 0}, channel);
                const auto at = [&](bool inside, int64_t offset) {
                    return inside && channels > 0 ? load_channels(from + offset, dy.channel, channels) : V{};
                };
                const V d[2][2] = {{at(true, 0), at(beside, dy.column)},
                                   {at(below, dy.row), at(below && beside, dy.row + dy.column)}};
                V t[4][2];
#pragma GCC unroll 2
                for (int j = 0; j < 2; ++j) {
                    t[0][j] = d[0][j], t[1][j] = d[0][j] + d[1][j];
                    t[2][j] = d[0][j] - d[1][j], t[3][j] = -d[1][j];
                }
                T* to = y + i / width * block * width + tile * width + i % width;
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r, to += 4 * y_position_) {
                    *reinterpret_cast<V*>(to) = t[r][0];
                    *reinterpret_cast<V*>(to + y_position_) = t[r][0] + t[r][1];
                    *reinterpret_cast<V*>(to + 2 * y_position_) = t[r][0] - t[r][1];
                    *reinterpret_cast<V*>(to + 3 * y_position_) = -t[r][1];
                }
            }
        });
    }

    // Adds the products of some blocks to the sums, [position][panel][input][width], or starts them.
    void multiply(int64_t panels, int64_t start, int64_t blocks, const T* v, const T* y, T* sums, T* bias, bool add,
                  int threads) const {
        const int64_t parts = threads > 8 ? panels : 1;
        parallel(16 * parts, 16 * blocks * block * p_.inputs * panels * width / 20, threads, [&](int64_t item) {
            const int64_t position = item % 16, part = item / 16, begin = part * panels / parts;
            for (int64_t b = 0; b < std::max<int64_t>(blocks, 1); ++b) {
                const int64_t count = std::min(block, tiles_.count - start - b * block);
                const T *rows = v + b * v_size_ + position * v_position_, *columns = y + b * y_size_ + position * y_position_;
                for (int64_t panel = begin; panel < (part + 1) * panels / parts; ++panel) {
                    const T* of_panel = columns + panel * block * width;
                    T* to = sums + (position * panels + panel) * sums_of_panel_;
                    const Start how = add || b > 0 ? Start::add : Start::zero;
                    for (int64_t i = 0; i < chunks_ * L; i += high, to += high * width)
                        multiply_block<high, 2, T>(count, {rows + i / L * block * L + i % L, 1, L}, of_panel, width, to, width,
                                                   how, nullptr);
                    if (position == 5) add_rows(count, of_panel, bias + panel * width);
                }
            }
        });
    }

    static void add_rows(int64_t count, const T* from, T* to) {
        V first{}, second{};
        for (int64_t i = 0; i < count; ++i) {
            first += *reinterpret_cast<const V*>(from + i * width);
            second += *reinterpret_cast<const V*>(from + i * width + L);
        }
        *reinterpret_cast<V*>(to) += first;
        *reinterpret_cast<V*>(to + L) += second;
    }

    // Gᵀ sums G to dw, and db.
    void write(int64_t panel, int64_t panels, const T* sums, const T* bias, int threads) const {
        constexpr int64_t together = 8;  // inputs, transformed before they are written as runs of numbers
        const int64_t position = panels * sums_of_panel_, items = (p_.inputs + together - 1) / together;
        const int64_t first = panel * width, outputs = std::min(panels * width, p_.outputs - first);
        T* dw = reinterpret_cast<T*>(p_.dweight) + first * p_.inputs * 9;
        std::copy_n(bias, outputs, reinterpret_cast<T*>(p_.dbias) + first);
        parallel(items, p_.inputs * outputs * 4, threads, [&](int64_t item) {
            const int64_t begin = item * together, count = std::min(together, p_.inputs - begin);
            alignas(64) T taps[together * 9 * L];
            for (int64_t c = 0; c < outputs; c += L) {
                for (int64_t i = 0; i < count; ++i) {
                    const T* from = sums + c / width * sums_of_panel_ + (begin + i) * width + c % width;
                    V t[3][4], *to = reinterpret_cast<V*>(taps + i * 9 * L);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j) {
                        const auto at = [&](int r) { return *reinterpret_cast<const V*>(from + (4 * r + j) * position); };
                        const V sum = T(0.5) * (at(1) + at(2));
                        t[0][j] = at(0) + sum, t[1][j] = T(0.5) * (at(1) - at(2)), t[2][j] = sum + at(3);
                    }
#pragma GCC unroll 3
                    for (int r = 0; r < 3; ++r) {
                        const V sum = T(0.5) * (t[r][1] + t[r][2]);
                        to[3 * r] = t[r][0] + sum, to[3 * r + 1] = T(0.5) * (t[r][1] - t[r][2]), to[3 * r + 2] = sum + t[r][3];
                    }
                }
                for (int64_t j = 0; j < std::min(L, outputs - c); ++j) {
                    T* to = dw + ((c + j) * p_.inputs + begin) * 9;
                    for (int64_t i = 0; i < count * 9; ++i) to[i] = taps[i * L + j];
                }
            }
        });
    }
};

// With no pixels both are zeros.
template <class T>
void convolution_gradient(const Convolution& p, int threads) {
    if (p.outputs > 0) WinogradGradientKernel<T>(p).run(threads);
}

}  // namespace ncsr::NCSR_ISA
