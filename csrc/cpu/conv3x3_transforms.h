// Winograd's minimal filtering F(m×m, 3×3): m×m outputs of a 3×3 convolution, for one pair of channels
//
//   Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A        d: the inputs around the tile of outputs, g: the 3×3 weights
//
// by n² products, n = m + 2, instead of 9m² (Winograd 1980, Lavin & Gray 2016). A, B and G come from n points, one of them
// infinity: the product of the polynomials whose coefficients are a line of weights and a line of outputs is determined by its
// values at the points, and Y is the transpose of that map. This file has the transforms of a line, such as Bᵀ d, every number
// being a vector of channels; and those for upsampled inputs, which need fewer products.
#pragma once

#include "cpu/matrix.h"

namespace ncsr::NCSR_ISA {

// Tile i of a line has `taken` inputs, from input_step·i + first_input on, and `given` outputs, from output_step·i +
// first_output on.
template <int taken_, int positions_, int given_, int first_output_ = 0, int input_step_ = given_>
struct Geometry {
    static constexpr int taken = taken_, positions = positions_, given = given_;
    static constexpr int first_input = -1, input_step = input_step_, first_output = first_output_, output_step = given_;
};

// F(2×2, 3×3) with the points 0, ±1, ∞: 16 products for 36; the transforms are sums and halves.
//
//   Bᵀ = 1  0 -1  0     G =  1   0   0     Aᵀ = 1  1  1  0
//        0  1  1  0         1/2 1/2 1/2         0  1 -1 -1
//        0 -1  1  0         1/2-1/2 1/2
//        0  1  0 -1          0   0   1
template <class T>
struct F2x2 : Geometry<4, 4, 2> {
    using V = typename Vector<T>::type;
    NCSR_FUNCTION static void input(const V* d, V* t) {  // Bᵀ d
        t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[1] - d[3];
    }
    NCSR_FUNCTION static void weight(const V* g, V* t) {  // G g
        const V half = T(0.5) * (g[0] + g[2]), odd = T(0.5) * g[1];
        t[0] = g[0], t[1] = half + odd, t[2] = half - odd, t[3] = g[2];
    }
    NCSR_FUNCTION static void output(const V* t, V* y) {  // Aᵀ t
        y[0] = t[0] + (t[1] + t[2]), y[1] = t[1] - t[2] - t[3];
    }
    NCSR_FUNCTION static void output_gradient(const V* y, V* t) {  // A y
        t[0] = y[0], t[1] = y[0] + y[1], t[2] = y[0] - y[1], t[3] = -y[1];
    }
    NCSR_FUNCTION static void weight_gradient(const V* t, V* g) {  // Gᵀ t
        const V half = T(0.5) * (t[1] + t[2]);
        g[0] = t[0] + half, g[1] = T(0.5) * (t[1] - t[2]), g[2] = half + t[3];
    }
};

// F(4×4, 3×3) with the points 0, ±a, ±b, ∞, a = 5/8 and b = 3/2: 36 products for 144. The rounding error is three to four times
// that of F(2×2, 3×3); with the usual points ±1, ±2 it would be ten times.
//
//   Bᵀ = a²b²    0   -a²-b²    0     1  0     G = 1/a²b²   0    0      Aᵀ = 1  1  1  1  1  0
//         0   -ab²    -b²      a     1  0         p  (1   a    a²)          0  a -a  b -b  0
//         0    ab²    -b²     -a     1  0         p  (1  -a    a²)          0  a² a² b² b² 0
//         0   -a²b    -a²      b     1  0         q  (1   b    b²)          0  a³-a³ b³-b³ 1
//         0    a²b    -a²     -b     1  0         q  (1  -b    b²)
//         0    a²b²    0    -a²-b²   0  1          0       0    1       1/p = 2a²(a² - b²), 1/q = 2b²(b² - a²)
template <class T>
struct F4x4 : Geometry<6, 6, 4> {
    using V = typename Vector<T>::type;
    static constexpr T a = T(0.625), b = T(1.5), aa = a * a, bb = b * b;
    static constexpr T p = T(0.5 / (0.390625 * (0.390625 - 2.25))), q = T(0.5 / (2.25 * (2.25 - 0.390625)));

    NCSR_FUNCTION static void input(const V* d, V* t) {
        const V even_a = d[4] - bb * d[2], odd_a = a * (d[3] - bb * d[1]);
        const V even_b = d[4] - aa * d[2], odd_b = b * (d[3] - aa * d[1]);
        t[0] = aa * bb * d[0] + (d[4] - (aa + bb) * d[2]), t[5] = aa * bb * d[1] + (d[5] - (aa + bb) * d[3]);
        t[1] = even_a + odd_a, t[2] = even_a - odd_a, t[3] = even_b + odd_b, t[4] = even_b - odd_b;
    }
    NCSR_FUNCTION static void weight(const V* g, V* t) {
        const V even_a = p * g[0] + p * aa * g[2], odd_a = p * a * g[1];
        const V even_b = q * g[0] + q * bb * g[2], odd_b = q * b * g[1];
        t[0] = T(1) / (aa * bb) * g[0], t[5] = g[2];
        t[1] = even_a + odd_a, t[2] = even_a - odd_a, t[3] = even_b + odd_b, t[4] = even_b - odd_b;
    }
    NCSR_FUNCTION static void output(const V* t, V* y) {
        const V even_a = t[1] + t[2], odd_a = t[1] - t[2], even_b = t[3] + t[4], odd_b = t[3] - t[4];
        y[0] = t[0] + (even_a + even_b), y[1] = a * odd_a + b * odd_b;
        y[2] = aa * even_a + bb * even_b, y[3] = aa * a * odd_a + (bb * b * odd_b + t[5]);
    }
    NCSR_FUNCTION static void output_gradient(const V* y, V* t) {
        const V even_a = y[0] + aa * y[2], odd_a = a * y[1] + aa * a * y[3];
        const V even_b = y[0] + bb * y[2], odd_b = b * y[1] + bb * b * y[3];
        t[0] = y[0], t[5] = y[3];
        t[1] = even_a + odd_a, t[2] = even_a - odd_a, t[3] = even_b + odd_b, t[4] = even_b - odd_b;
    }
    NCSR_FUNCTION static void weight_gradient(const V* t, V* g) {
        const V even_a = p * (t[1] + t[2]), odd_a = p * a * (t[1] - t[2]);
        const V even_b = q * (t[3] + t[4]), odd_b = q * b * (t[3] - t[4]);
        g[0] = T(1) / (aa * bb) * t[0] + (even_a + even_b), g[1] = odd_a + odd_b;
        g[2] = aa * even_a + (bb * even_b + t[5]);
    }
};

// The convolution of an input upsampled by 2: 25 products for 4×4 outputs, where F(4×4, 3×3) has 36, as has one 1×1 convolution
// for each of the sums {w0, w0 + w1 + w2, w2}². With three pixels x0, x1, x2 of a line and the weights g, the outputs at the
// two upsampled pixels of x1 and at their neighbours on either side are
//
//   y0, y1, y2, y3 = (g0 + g1) (x0 - x1) + c,   g0 (x0 - x1) + c,   g2 (x2 - x1) + c,   (g1 + g2) (x2 - x1) + c
//   c = (g0 + g1 + g2) x1
//
// and the next tile begins two pixels of x further.
template <class T>
struct Upsample2x : Geometry<3, 5, 4, -1, 2> {
    using V = typename Vector<T>::type;
    NCSR_FUNCTION static void input(const V* d, V* t) { t[0] = t[1] = d[0] - d[1], t[2] = d[1], t[3] = t[4] = d[2] - d[1]; }
    NCSR_FUNCTION static void weight(const V* g, V* t) {
        t[0] = g[0], t[1] = g[0] + g[1], t[2] = t[1] + g[2], t[3] = g[1] + g[2], t[4] = g[2];
    }
    NCSR_FUNCTION static void output(const V* t, V* y) {
        y[0] = t[1] + t[2], y[1] = t[0] + t[2], y[2] = t[4] + t[2], y[3] = t[3] + t[2];
    }
    NCSR_FUNCTION static void output_gradient(const V* y, V* t) {
        t[0] = y[1], t[1] = y[0], t[2] = (y[0] + y[1]) + (y[2] + y[3]), t[3] = y[3], t[4] = y[2];
    }
    NCSR_FUNCTION static void weight_gradient(const V* t, V* g) {
        g[0] = t[0] + t[1] + t[2], g[1] = t[1] + t[2] + t[3], g[2] = t[2] + t[3] + t[4];
    }
};

// The gradient of x of that convolution: dy convolved with the weights g rotated by 180°, then summed over 2×2 pixels. Two such
// sums s of a line, of the pixels d1 to d4, are
//
//   s0 = g0 (d0 - d2) + (g0 + g1) (d1 - d3) + c,   s1 = (g1 + g2) (d4 - d2) + g2 (d5 - d3) + c,   c = (g0 + g1 + g2) (d2 + d3)
template <class T>
struct Upsample2xGradient : Geometry<6, 5, 2, 0, 4> {
    using V = typename Vector<T>::type;
    NCSR_FUNCTION static void input(const V* d, V* t) {
        t[0] = d[0] - d[2], t[1] = d[1] - d[3], t[2] = d[2] + d[3], t[3] = d[4] - d[2], t[4] = d[5] - d[3];
    }
    NCSR_FUNCTION static void weight(const V* g, V* t) { Upsample2x<T>::weight(g, t); }
    NCSR_FUNCTION static void output(const V* t, V* y) { y[0] = t[0] + t[1] + t[2], y[1] = t[2] + t[3] + t[4]; }
};

// The tiles of all images, numbered row by row; tiles at the edges may be partly outside.
template <class Line>
struct ImageTiles {
    int64_t down, across, count;
    ImageTiles(const Conv3x3& p) : down(tiles(p.rows)), across(tiles(p.columns)), count(p.batch * down * across) {}

    static int64_t tiles(int64_t outputs) { return (outputs - Line::first_output + Line::given - 1) / Line::given; }

    // Calls use(i, sample, row, column) for `count` tiles from `first` on, with rows and columns counted in tiles.
    template <class Use>
    void each(int64_t first, int64_t count, Use use) const {
        int64_t sample = first / (down * across), row = first / across % down, column = first % across;
        for (int64_t i = 0; i < count; ++i) {
            use(i, sample, row, column);
            if (++column < across) continue;
            column = 0;
            if (++row < down) continue;
            row = 0, ++sample;
        }
    }
};

// Transformed tiles: the vectors of channels are at data + position·i + chunk·j + tile·k.
template <class T>
struct Transformed {
    T* data;
    int64_t position, chunk, tile;
};

// Channels of a pixel, at most a vector of them, with zeros in the other lanes.
template <class T>
NCSR_FUNCTION typename Vector<T>::type load_channels(const T* from, int64_t stride, int64_t channels) {
    using V = typename Vector<T>::type;
    if (stride == 1 && channels >= Vector<T>::length) return *reinterpret_cast<const V*>(from);
    T some[Vector<T>::length] = {};
    for (int64_t i = 0; i < std::min(channels, Vector<T>::length); ++i) some[i] = from[i * stride];
    return *reinterpret_cast<const V*>(some);
}

// Bᵀ d B of the channels [begin, end) of `count` tiles.
template <class Line, class T>
void transform_input(const Conv3x3& p, const ImageTiles<Line>& tiles, int64_t first, int64_t count, int64_t begin, int64_t end,
                     const Transformed<T>& to) {
    using V = typename Vector<T>::type;
    constexpr int64_t L = Vector<T>::length;
    constexpr int taken = Line::taken, positions = Line::positions;
    const Tensor& x = p.x;
    tiles.each(first, count, [&](int64_t tile, int64_t sample, int64_t tile_row, int64_t tile_column) {
        const int64_t row = Line::input_step * tile_row + Line::first_input;
        const int64_t column = Line::input_step * tile_column + Line::first_input;
        const T* at = address<const T>(x, Run{sample, row, column, 0}, begin);
        const bool interior = row >= 0 && column >= 0 && row + taken <= p.x_rows && column + taken <= p.x_columns;
        for (int64_t c = begin; c < end; c += L, at += L * x.channel) {
            V t[positions][taken];
            const bool whole = interior && x.channel == 1 && end - c >= L;
            const auto transform_column = [&](int j, auto load) {
                V d[taken], line_out[positions];
#pragma GCC unroll 6
                for (int i = 0; i < taken; ++i) d[i] = load(i, j);
                Line::input(d, line_out);
#pragma GCC unroll 6
                for (int i = 0; i < positions; ++i) t[i][j] = line_out[i];
            };
            if (whole) {
#pragma GCC unroll 6
                for (int j = 0; j < taken; ++j)
                    transform_column(j,
                                     [&](int r, int s) { return *reinterpret_cast<const V*>(at + r * x.row + s * x.column); });
            } else {
                for (int j = 0; j < taken; ++j)
                    transform_column(j, [&](int r, int s) {
                        const bool inside = row + r >= 0 && row + r < p.x_rows && column + s >= 0 && column + s < p.x_columns;
                        return inside ? load_channels(at + r * x.row + s * x.column, x.channel, end - c) : V{};
                    });
            }
            T* out = to.data + (c - begin) / L * to.chunk + tile * to.tile;
#pragma GCC unroll 6
            for (int i = 0; i < positions; ++i) {
                V line_out[positions];
                Line::input(t[i], line_out);
#pragma GCC unroll 6
                for (int j = 0; j < positions; ++j, out += to.position) {
                    *reinterpret_cast<V*>(out) = line_out[j];
                    __builtin_prefetch(out + 2 * to.tile, 1);  // for the next tiles but one
                }
            }
        }
    });
}

}  // namespace ncsr::NCSR_ISA
