// affine_injector, affine_coupling and gaussian_split on the CPU: each element of the changed channels for itself.
#pragma once

#include "cpu_tiles.h"

namespace ncsr::NCSR_ISA {

// Of a piece: all channels of a few pixels, in buffers that stay in the first-level cache; or one channel of many pixels,
// which is read where it lies, in runs long enough for the prefetchers.
constexpr int64_t pixels_piece = 1024, planes_piece = 4096;

// A run of pixels as pieces of a tile that are dense in memory where they can be: one channel of a long run, or all
// channels of a few pixels.
struct Pieces {
    Order order;
    int64_t pixels, channels;
    Pieces(const Pointwise& p) : order(order_of(p.x)) {
        const int64_t changed = p.size.channels - p.kept;
        channels = order == Order::planes ? 1 : changed;
        pixels = std::max<int64_t>(1, (order == Order::planes ? planes_piece : pixels_piece) / channels);
    }
    int64_t elements() const { return pixels * channels; }

    // What is copied before the changed channels are written: the kept ones; in rows of channels all, as one run of memory.
    int64_t copied(const Pointwise& p) const { return p.kept && order == Order::pixels ? p.size.channels : p.kept; }
};

template <class T, class M, bool inverse>
void pointwise_forward(Pointwise p, int threads) {
    join_rows(p.size, {&p.x, &p.h, &p.y});
    const Pieces pieces(p);
    const Tiling tiling(p.size, pieces.pixels, 64);
    const int64_t changed = p.size.channels - p.kept;
    std::vector<double> partial(size_t(tiling.items()));
    const int64_t cost = p.size.batch * p.size.rows * p.size.columns * changed;
    parallel(tiling.items(), cost, threads, [&](int64_t item) {
        Scratch<T> scratch(4 * Scratch<T>::rounded(pieces.elements()));
        T *x = scratch.take(pieces.elements()), *y = scratch.take(pieces.elements());
        const Pair<T> pair{scratch.take(pieces.elements()), scratch.take(pieces.elements())};
        LogDet<T, M> logdet(p.eps);
        tiling.tiles(item, [&](const Run& run) {
            copy_channels(p.x, p.y, run, pieces.order, pieces.copied(p));
            for (int64_t c = 0; c < changed; c += pieces.channels) {
                const int64_t count = pieces.channels;
                const auto h = load_pairs(pair, p.h, run, pieces.order, c, count);
                const T* from = load(x, p.x, run, pieces.order, p.kept + c, count);
                T* to = place(y, p.y, run, pieces.order, p.kept + c, count);
                apply<M, inverse>(count * run.pixels, from, h, T(p.eps), to, &logdet);
                store(to, p.y, run, pieces.order, p.kept + c, count);
            }
        });
        partial[size_t(item)] = logdet.total();
    });
    write_logdet<T>(partial, tiling, inverse ? -1.0 : 1.0, p.logdet);
}

template <class T, class M, bool inverse>
void pointwise_backward(Pointwise p, int threads) {
    join_rows(p.size, {&p.x, &p.h, &p.dy, &p.dx, &p.dh});
    const Pieces pieces(p);
    const Tiling tiling(p.size, pieces.pixels, 64);
    const int64_t changed = p.size.channels - p.kept;
    const int64_t cost = p.size.batch * p.size.rows * p.size.columns * changed * 2;
    parallel(tiling.items(), cost, threads, [&](int64_t item) {
        const int64_t elements = pieces.elements();
        Scratch<T> scratch(7 * Scratch<T>::rounded(elements));
        T *x = scratch.take(elements), *dy = scratch.take(elements), *dx = scratch.take(elements);
        const Pair<T> pair{scratch.take(elements), scratch.take(elements)};
        const Pair<T> dpair{scratch.take(elements), scratch.take(elements)};
        const T g = per_sample<T>(p.dlogdet, item / tiling.parts);
        tiling.tiles(item, [&](const Run& run) {
            copy_channels(p.dy, p.dx, run, pieces.order, pieces.copied(p));
            for (int64_t c = 0; c < changed; c += pieces.channels) {
                const int64_t count = pieces.channels;
                const auto h = load_pairs(pair, p.h, run, pieces.order, c, count);
                const T* from = load(x, p.x, run, pieces.order, p.kept + c, count);
                const T* gradient = load(dy, p.dy, run, pieces.order, p.kept + c, count);
                T* to = place(dx, p.dx, run, pieces.order, p.kept + c, count);
                const Pair<T> to_pair = place_pairs(dpair, p.dh, run, pieces.order, c, count);
                apply_backward<M, inverse, false>(count * run.pixels, gradient, g, from, h, T(p.eps), to, to_pair);
                store(to, p.dx, run, pieces.order, p.kept + c, count);
                store_pairs(to_pair, p.dh, run, pieces.order, c, count);
            }
        });
    });
}

}  // namespace ncsr::NCSR_ISA
