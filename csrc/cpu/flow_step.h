// The fused flow step on the CPU: an affine map, the C×C matrix and another affine map of a tile of pixels while the tile is in
// the cache.
//
//   forward   a = before(x), w = mix·a + offset, y = after(w)
//   backward  dw = after'(dy; y), dmix = Σ dw ⊗ a, doffset = Σ dw, da = mixᵀ·dw, dx = before'(da; x), a recomputed
#pragma once

#include "cpu/matrix.h"

namespace ncsr::NCSR_ISA {

// The layout of a tile in a buffer, its rows padded to whole vectors: Order::planes has C rows of pixels, Order::pixels rows of
// C channels.
template <class T>
struct StepTile {
    Order order;
    int64_t channels, pixels, row;

    StepTile(const FlowStep& p) : order(memory_order(p.x)), channels(p.size.channels) {
        // Rows of channels: 8 KB a buffer, for the first-level cache. Planes: 64 KB, for the second, since a tile is read from
        // C places and the prefetchers need long runs; twice as fast as 8 KB for 320×320 pixels, which come from memory. At
        // least 32 pixels, two of the widest vectors; 64 where the matrix, which every tile reads, is larger than that cache.
        const int64_t bytes = order == Order::planes ? 65536 : 8192, least = channels > 128 ? 64 : 32;
        pixels = std::max<int64_t>(least, bytes / int64_t(sizeof(T)) / channels / 32 * 32);
        row = spread<T>(padded<T>(order == Order::planes ? pixels : channels));
    }
    int64_t rows() const { return order == Order::planes ? channels : pixels; }
    int64_t elements() const { return rows() * row; }

    // Calls use(piece, first changed channel, channels, elements) for dense pieces of the changed channels of a tile. Of
    // planes a piece is a row of pixels, whose pairs are read in place, or all rows where they are short, for fewer calls. Rows
    // of channels are one piece, copied to `buffer` and back where not all channels change.
    template <class Use>
    void pieces(T* tile, const Run& run, int64_t pass_through, T* buffer, Use use) const {
        const int64_t changed = channels - pass_through;
        const bool short_rows = run.pixels == row && row <= 4 * lanes;
        if (order == Order::planes && short_rows) return use(tile + pass_through * row, 0, changed, changed * row);
        if (order == Order::planes) {
            for (int64_t c = 0; c < changed; ++c) use(tile + (pass_through + c) * row, c, 1, run.pixels);
            return;
        }
        if (changed == row) return use(tile, 0, changed, changed * run.pixels);
        move(buffer, changed, 1, tile + pass_through, row, 1, run.pixels, changed);
        use(buffer, 0, changed, changed * run.pixels);
        move(tile + pass_through, row, 1, buffer, changed, 1, run.pixels, changed);
    }

    void load(T* tile, const Tensor& x, const Run& run) const {
        with_type(x.dtype, [&](auto* type) {
            auto* from = address<std::remove_pointer_t<decltype(type)>>(x, run, 0);
            if (order == Order::planes)
                move(tile, row, 1, from, x.channel, x.column, channels, run.pixels);
            else
                move(tile, row, 1, from, x.column, x.channel, run.pixels, channels);
        });
    }

    void store(const T* tile, const Tensor& y, const Run& run) const {
        with_type(y.dtype, [&](auto* type) {
            auto* to = address<std::remove_pointer_t<decltype(type)>>(y, run, 0);
            if (order == Order::planes)
                move(to, y.channel, y.column, tile, row, 1, channels, run.pixels);
            else
                move(to, y.column, y.channel, tile, row, 1, run.pixels, channels);
        });
    }

    // to = matrix·from + offset at every pixel; `matrix` is as `prepare` writes it, `offset` may be null
    void mix(T* to, const T* from, const T* matrix, const T* offset, int64_t count) const {
        if (order == Order::planes)
            multiply(channels, count, channels, Scalars<T>{matrix, matrix_row(), 1}, from, row, to, row,
                     offset ? Start::row : Start::zero, offset);
        else
            multiply(count, channels, channels, Scalars<T>{from, row, 1}, matrix, matrix_row(), to, row,
                     offset ? Start::column : Start::zero, offset);
    }
    // Rows a whole number of pages' fractions apart would share few sets of the first-level cache.
    int64_t matrix_row() const { return spread<T>(padded<T>(channels)); }
    int64_t matrix_elements() const { return channels * matrix_row(); }

    // Writes a matrix, or its transpose, as `mix` reads it: row by row for planes, column by column for pixels.
    void prepare(T* to, const char* matrix, bool transposed) const {
        const T* from = reinterpret_cast<const T*>(matrix);
        const bool by_column = transposed != (order == Order::pixels);
        for (int64_t i = 0; i < channels; ++i)
            for (int64_t j = 0; j < channels; ++j)
                to[i * matrix_row() + j] = by_column ? from[j * channels + i] : from[i * channels + j];
    }

    // dmix += Σ dw ⊗ a (rows of length row_of_matrix) and doffset += Σ dw; `buffer` holds a tile
    void add_outer(T* dmix, T* doffset, const T* dw, const T* a, int64_t count, T* buffer) const {
        const Scalars<T> gradient = order == Order::planes ? Scalars<T>{dw, row, 1} : Scalars<T>{dw, 1, row};
        int64_t a_row = row;
        if (order == Order::planes) {  // the product reads the channels of a pixel as vectors
            a_row = matrix_row();
            for (int64_t c = 0; c < channels; ++c)
                for (int64_t i = 0; i < count; ++i) buffer[i * a_row + c] = a[c * row + i];
            a = buffer;
        }
        multiply(channels, channels, count, gradient, a, a_row, dmix, matrix_row(), Start::add);
        if (order == Order::pixels) {
            for (int64_t i = 0; i < count; ++i)
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) doffset[c] += dw[i * row + c];
            return;
        }
        for (int64_t c = 0; c < channels; ++c) {
            T sum = T(0);
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < count; ++i) sum += dw[c * row + i];
            doffset[c] += sum;
        }
    }
};

template <class T, bool inverse>
void affine_in_place(const StepTile<T>& layout, T* tile, const Tensor& h, int64_t pass_through, T eps, const Run& run,
                     T* buffer, Pair<T> pair, LogDet<T, Affine>* logdet) {
    layout.pieces(tile, run, pass_through, buffer, [&](T* piece, int64_t c, int64_t count, int64_t n) {
        apply<Affine, inverse>(n, piece, load_pairs(pair, h, run, layout.order, c, count), eps, piece, logdet);
    });
}

template <class T, bool inverse, bool from_output>
void affine_backward_in_place(const StepTile<T>& layout, T* gradient, T g, const Tensor& v, const Tensor& h, const Tensor& dh,
                              int64_t pass_through, T eps, const Run& run, T* buffer, T* values, Pair<T> pair, Pair<T> dpair) {
    layout.pieces(gradient, run, pass_through, buffer, [&](T* piece, int64_t c, int64_t count, int64_t n) {
        const auto pairs = load_pairs(pair, h, run, layout.order, c, count);
        const T* at = load(values, v, run, layout.order, pass_through + c, count);
        const Pair<T> to = place_pairs(dpair, dh, run, layout.order, c, count);
        apply_backward<Affine, inverse, from_output>(n, piece, g, at, pairs, eps, piece, to);
        store_pairs(to, dh, run, layout.order, c, count);
    });
}

template <class T>
int64_t step_cost(const FlowStep& p) {
    const int64_t maps = (p.h_before.data ? p.size.channels : 0) + (p.h_after.data ? p.size.channels : 0);
    return p.size.batch * p.size.rows * p.size.columns * (maps + p.size.channels * (1 + p.size.channels / 32));
}

template <class T, bool inverse>
void flow_step_forward(FlowStep p, int threads) {
    join_rows(p.size, {&p.x, &p.h_before, &p.h_after, &p.y});
    const StepTile<T> layout(p);
    const Tiling tiling(p.size, layout.pixels, 1, 4096, 64);
    std::vector<double> partial(size_t(tiling.items()));
    std::vector<T> matrix(size_t(layout.matrix_elements()));
    std::vector<T> offset(size_t(layout.matrix_row()));
    layout.prepare(matrix.data(), p.mix, false);
    std::copy_n(reinterpret_cast<const T*>(p.offset), p.size.channels, offset.data());
    parallel(tiling.items(), step_cost<T>(p), threads, [&](int64_t item) {
        Scratch<T> scratch(5 * Scratch<T>::rounded(layout.elements()));
        T *a = scratch.take(layout.elements()), *w = scratch.take(layout.elements()), *buffer = scratch.take(layout.elements());
        const Pair<T> pair{scratch.take(layout.elements()), scratch.take(layout.elements())};
        LogDet<T, Affine> logdet(p.eps);
        tiling.tiles(item, [&](const Run& run, int64_t) {
            layout.load(a, p.x, run);
            if (p.h_before.data)
                affine_in_place<T, inverse>(layout, a, p.h_before, p.pass_before(), T(p.eps), run, buffer, pair, &logdet);
            layout.mix(w, a, matrix.data(), offset.data(), run.pixels);
            if (p.h_after.data)
                affine_in_place<T, inverse>(layout, w, p.h_after, p.pass_after(), T(p.eps), run, buffer, pair, &logdet);
            layout.store(w, p.y, run);
        });
        partial[size_t(item)] = logdet.total();
    });
    write_logdet<T>(partial, tiling, inverse ? -1.0 : 1.0, p.logdet);
}

template <class T, bool inverse>
void flow_step_backward(FlowStep p, int threads) {
    join_rows(p.size, {&p.x, &p.h_before, &p.h_after, &p.y, &p.dy, &p.dx, &p.dh_before, &p.dh_after});
    const StepTile<T> layout(p);
    // fewer and larger parts than forward, since each has a C×C partial sum
    const int64_t square = p.size.channels * p.size.channels;
    const Tiling tiling(p.size, layout.pixels, 1, std::max<int64_t>(4096, square / 2), 32);
    const int64_t channels = p.size.channels, elements = layout.elements();
    const int64_t part_size = layout.matrix_elements() + layout.matrix_row();
    std::vector<T> partial(size_t(tiling.items() * part_size));
    std::vector<T> transposed(size_t(layout.matrix_elements()));
    layout.prepare(transposed.data(), p.mix, true);
    parallel(tiling.items(), 2 * step_cost<T>(p), threads, [&](int64_t item) {
        const int64_t by_pixel = layout.pixels * layout.matrix_row();  // elements of a tile as `add_outer` copies it
        Scratch<T> scratch(7 * Scratch<T>::rounded(elements) + 2 * Scratch<T>::rounded(std::max(elements, by_pixel)));
        T *a = scratch.take(elements), *dw = scratch.take(elements), *da = scratch.take(elements);
        T *buffer = scratch.take(std::max(elements, by_pixel)), *values = scratch.take(std::max(elements, by_pixel));
        const Pair<T> pair{scratch.take(elements), scratch.take(elements)};
        const Pair<T> dpair{scratch.take(elements), scratch.take(elements)};
        T *dmix = partial.data() + item * part_size, *doffset = dmix + layout.matrix_elements();
        const T g = per_sample<T>(p.dlogdet, item / tiling.parts), eps = T(p.eps);
        tiling.tiles(item, [&](const Run& run, int64_t) {
            layout.load(a, p.x, run);
            if (p.h_before.data)
                affine_in_place<T, inverse>(layout, a, p.h_before, p.pass_before(), eps, run, buffer, pair, nullptr);
            layout.load(dw, p.dy, run);
            if (p.h_after.data)
                affine_backward_in_place<T, inverse, true>(layout, dw, g, p.y, p.h_after, p.dh_after, p.pass_after(), eps, run,
                                                           buffer, values, pair, dpair);
            layout.add_outer(dmix, doffset, dw, a, run.pixels, buffer);
            layout.mix(da, dw, transposed.data(), nullptr, run.pixels);
            if (p.h_before.data)
                affine_backward_in_place<T, inverse, false>(layout, da, g, p.x, p.h_before, p.dh_before, p.pass_before(), eps,
                                                            run, buffer, values, pair, dpair);
            layout.store(da, p.dx, run);
        });
    });
    std::vector<double> total(size_t(part_size), 0.0);  // over the parts in their order, a slice of the numbers by a thread
    constexpr int64_t slices = 16;
    parallel(slices, tiling.items() * part_size / 4, threads, [&](int64_t slice) {
        const int64_t begin = slice * part_size / slices, end = (slice + 1) * part_size / slices;
        for (int64_t item = 0; item < tiling.items(); ++item)
#pragma omp simd
            for (int64_t i = begin; i < end; ++i) total[size_t(i)] += double(partial[size_t(item * part_size + i)]);
    });
    const double* sum_offset = total.data() + layout.matrix_elements();
    move(reinterpret_cast<T*>(p.dmix), channels, 1, total.data(), layout.matrix_row(), 1, channels, channels);
    move(reinterpret_cast<T*>(p.doffset), channels, 1, sum_offset, channels, 1, 1, channels);
}

}  // namespace ncsr::NCSR_ISA
