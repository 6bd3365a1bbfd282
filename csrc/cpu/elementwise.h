// affine_injector, affine_coupling and gaussian_split on the CPU: a map of each element of the changed channels.
#pragma once

#include "cpu/tiles.h"

namespace ncsr::NCSR_ISA {

// Elements of a piece: channels-last, all changed channels of a few pixels, in buffers that stay in the first-level cache; for
// NCHW a run of pixels of one channel, read in place, long enough for the prefetchers.
constexpr int64_t pixels_piece = 1024, planes_piece = 4096;
constexpr int64_t part_elements = 4096;

struct Pieces {
    Order order;
    int64_t pixels, channels;  // of a piece
    Pieces(const Elementwise& p) : order(memory_order(p.x)) {
        channels = order == Order::planes ? 1 : p.size.channels - p.pass_through;
        pixels = std::max<int64_t>(1, (order == Order::planes ? planes_piece : pixels_piece) / channels);
        const int64_t count = std::max<int64_t>(1, (p.size.columns + pixels - 1) / pixels);  // of about equal length
        pixels = std::max<int64_t>(1, (p.size.columns + count - 1) / count);
        pixels = order == Order::planes ? (pixels + lanes - 1) / lanes * lanes : pixels;
    }
    int64_t elements() const { return pixels * channels; }
    Tiling tiling(const Sizes& size) const {
        return Tiling(size, pixels, order == Order::planes ? size.channels : 1, part_elements, 64);
    }
    // Copies the pass-through channels of a tile. Returns the index of the tile's first changed channel among the changed ones,
    // or -1 where the tile has none. In rows of channels all channels are copied, as one run of memory.
    int64_t changed(const Elementwise& p, const Tensor& x, const Tensor& y, const Run& run, int64_t group) const {
        if (order == Order::planes && group >= p.pass_through) return group - p.pass_through;
        if (p.pass_through) copy_channels(x, y, run, order, group, order == Order::planes ? 1 : p.size.channels);
        return order == Order::planes ? -1 : 0;
    }
};

template <class T, class M, bool inverse>
void elementwise_forward(Elementwise p, int threads) {
    join_rows(p.size, {&p.x, &p.h, &p.y});
    const Pieces pieces(p);
    const Tiling tiling = pieces.tiling(p.size);
    const int64_t count = pieces.channels, elements = pieces.elements();
    const int64_t cost = p.size.batch * p.size.rows * p.size.columns * (p.size.channels - p.pass_through);
    std::vector<double> partial(size_t(tiling.items()));
    parallel(tiling.items(), cost, threads, [&](int64_t item) {
        Scratch<T> scratch(4 * Scratch<T>::rounded(elements));
        T *x = scratch.take(elements), *y = scratch.take(elements);
        const Pair<T> pair{scratch.take(elements), scratch.take(elements)};
        LogDet<T, M> logdet(p.eps);
        tiling.tiles(item, [&](const Run& run, int64_t group) {
            const int64_t c = pieces.changed(p, p.x, p.y, run, group);
            if (c < 0) return;
            const auto h = load_pairs(pair, p.h, run, pieces.order, c, count);
            const T* from = load(x, p.x, run, pieces.order, p.pass_through + c, count);
            T* to = place(y, p.y, run, pieces.order, p.pass_through + c, count);
            apply<M, inverse>(count * run.pixels, from, h, T(p.eps), to, &logdet);
            store(to, p.y, run, pieces.order, p.pass_through + c, count);
        });
        partial[size_t(item)] = logdet.total();
    });
    write_logdet<T>(partial, tiling, inverse ? -1.0 : 1.0, p.logdet);
}

template <class T, class M, bool inverse>
void elementwise_backward(Elementwise p, int threads) {
    join_rows(p.size, {&p.x, &p.h, &p.dy, &p.dx, &p.dh});
    const Pieces pieces(p);
    const Tiling tiling = pieces.tiling(p.size);
    const int64_t count = pieces.channels, elements = pieces.elements();
    const int64_t cost = 2 * p.size.batch * p.size.rows * p.size.columns * (p.size.channels - p.pass_through);
    parallel(tiling.items(), cost, threads, [&](int64_t item) {
        Scratch<T> scratch(7 * Scratch<T>::rounded(elements));
        T *x = scratch.take(elements), *dy = scratch.take(elements), *dx = scratch.take(elements);
        const Pair<T> pair{scratch.take(elements), scratch.take(elements)};
        const Pair<T> dpair{scratch.take(elements), scratch.take(elements)};
        const T g = per_sample<T>(p.dlogdet, item / tiling.parts);
        tiling.tiles(item, [&](const Run& run, int64_t group) {
            const int64_t c = pieces.changed(p, p.dy, p.dx, run, group);
            if (c < 0) return;
            const auto h = load_pairs(pair, p.h, run, pieces.order, c, count);
            const T* from = load(x, p.x, run, pieces.order, p.pass_through + c, count);
            const T* gradient = load(dy, p.dy, run, pieces.order, p.pass_through + c, count);
            T* to = place(dx, p.dx, run, pieces.order, p.pass_through + c, count);
            const Pair<T> to_pair = place_pairs(dpair, p.dh, run, pieces.order, c, count);
            apply_backward<M, inverse, false>(count * run.pixels, gradient, g, from, h, T(p.eps), to, to_pair);
            store(to, p.dx, run, pieces.order, p.pass_through + c, count);
            store_pairs(to_pair, p.dh, run, pieces.order, c, count);
        });
    });
}

}  // namespace ncsr::NCSR_ISA
