// The network of an injector or a coupling in one pass, each piece of an image while the piece is in the cache.
//
//   h1 = relu(w1 ∗ z1 + pre)      pre: pre-activations of the condition, the bias included; z1 may be absent
//   h2 = relu(w2 · h1 + b2)
//   y  = w3 ∗ h2 + b3             w1 and w3 are 3×3, with zero padding
//
// All three are products of matrices whose rows are pixels and whose columns are channels, adjacent in the lanes of vectors.
// The first reads three runs of 3·pass_through adjacent numbers for every pixel. The last is a scatter: the products of a pixel
// of h2 with all nine taps, one row of 9·outputs numbers, are added to the nine pixels of y around the pixel. So h2 needs no
// border and the pieces of h2 no overlap, 12 outputs leave 4 lanes of 112 unused instead of 4 of 16, and the part of the
// weights that is read for every tile of pixels has 16 KB, for the first-level cache. The additions cost some 5%.
//
// The terms of an output are summed in one order, however an image is divided among threads: the same input gives the same
// bits whatever the number of threads, although the division depends on that number.
#pragma once

#include "cpu/matrix.h"

namespace ncsr::NCSR_ISA {

// Rows and vectors of the sums, which are in registers: 24 of 32, or 12 and 8 of 16.
#if defined(__AVX512F__)
constexpr int tile_rows = 6, tile_vectors = 4;
#elif defined(__AVX2__)
constexpr int tile_rows = 6, tile_vectors = 2;
#else
constexpr int tile_rows = 4, tile_vectors = 2;
#endif

// A matrix (inner × columns) as panels of tile_vectors vectors of columns, the last panel narrower. The rows of a panel are
// adjacent in memory. Products with the padding behind the last column are never used.
template <class T>
struct Panels {
    static constexpr int64_t width = tile_vectors * Vector<T>::length, together = 8;
    int64_t inner, columns;
    T* data;

    int64_t count() const { return (columns + width - 1) / width; }
    int64_t panel_width(int64_t panel) const { return std::min(width, padded<T>(columns) - panel * width); }
    T* at(int64_t panel) const { return data + panel * width * inner; }
    int64_t elements() const { return inner * padded<T>(columns); }

    // Fills `rows` rows from `row` on of `count` columns from `column` on; `together` columns at a time are the fastest.
    void fill(int64_t row, int64_t rows, int64_t column, int64_t count, const T* from, int64_t row_stride,
              int64_t column_stride) const {
        for (int64_t some; count > 0; column += some, count -= some, from += some * column_stride) {
            const int64_t panel = column / width, n = panel_width(panel);
            some = std::min(count, (panel + 1) * width - column);
            T* to = at(panel) + row * n + column % width;
            for (int64_t r = 0; r < rows && some == together; ++r)  // the loop below with a constant length
                for (int64_t c = 0; c < together; ++c) to[r * n + c] = from[r * row_stride + c * column_stride];
            for (int64_t r = 0; r < rows && some != together; ++r)
                for (int64_t c = 0; c < some; ++c) to[r * n + c] = from[r * row_stride + c * column_stride];
        }
    }
};

// y = values + a·b, or relu(values + a·b + more). A row of a is `runs` runs of adjacent numbers at a stride of `step`.
template <class T>
struct Product {
    Scalars<T> a;
    Panels<T> b;
    T* y;
    int64_t y_row;
    const T* values = nullptr;  // one for each column of the panels, or null
    const T* more = nullptr;  // rows of whole vectors, for relu only, or null; added last, when memory has delivered them
    int64_t more_row = 0;
    int64_t runs = 1, step = 0;
    bool relu = false;

    // `rows` rows of y: all columns, or those of the panels that contain the columns [begin, end).
    void run(int64_t rows) const { run(rows, 0, b.columns); }
    void run(int64_t rows, int64_t begin, int64_t end) const {
        const int64_t width = Panels<T>::width;
        for (int64_t panel = begin / width; panel * width < end; ++panel) tiles<tile_vectors>(rows, panel);
    }

  private:
    template <int N>
    void tiles(int64_t rows, int64_t panel) const {
        if (b.panel_width(panel) != N * Vector<T>::length) {
            if constexpr (N > 1) tiles<N - 1>(rows, panel);
            return;
        }
        const int64_t count = (rows + tile_rows - 1) / tile_rows;
        for (int64_t i = 0; i < count; ++i) {  // of nearly equal heights
            const int64_t first = i * rows / count;
            tile<tile_rows, N>((i + 1) * rows / count - first, first, panel);
        }
    }

    template <int M, int N>
    void tile(int64_t height, int64_t first, int64_t panel) const {
        if (height != M) {
            if constexpr (M > 1) tile<M - 1, N>(height, first, panel);
            return;
        }
        const int64_t inner = b.inner / runs, width = N * Vector<T>::length, column = panel * Panels<T>::width;
        const T* rest = more ? more + first * more_row + column : nullptr;
        for (int64_t i = 0; rest && i < M; ++i) prefetch(rest + i * more_row, width * int64_t(sizeof(T)));
        Sums<M, N, T> sums;
        sums.start(values ? Start::column : Start::zero, nullptr, 0, values ? values + column : nullptr);
        for (int64_t i = 0; i < runs; ++i)
            sums.add(inner, {a.data + first * a.row + i * step, a.row, 1}, b.at(panel) + i * inner * width, width);
        if (relu)
            sums.store_relu(y + first * y_row + column, y_row, rest, more_row);
        else
            sums.store(y + first * y_row + column, y_row);
    }
};

// Reads all channels of a run of pixels into rows at a stride of `to_row`.
template <class T>
void load_pixels(T* to, int64_t to_row, const Tensor& x, const Run& run, int64_t channels) {
    const T* from = address<const T>(x, run, 0);
    if (x.channel == 1)
        move(to, to_row, 1, from, x.column, 1, run.pixels, channels);
    else
        move(to, 1, to_row, from, x.channel, x.column, channels, run.pixels);
}

template <class T>
class StepNetworkKernel {
    // The size of a piece: many pixels, since the weights are read once for each piece, but no more products with the taps
    // than fit in the second-level cache beside the weights.
    static constexpr int64_t most_pixels = 96, most_bytes = 196608;
    const StepNetwork& p_;
    int64_t hidden_row_, product_row_, output_row_;  // lengths of the buffers' rows
    int64_t tall_, wide_;  // rows and columns of a piece: whole rows of the image, or a part of one
    int64_t bands_;  // parts of the rows of a sample
    Panels<T> w1_, w2_, w3_;
    T *b2_, *b3_;

  public:
    StepNetworkKernel(const StepNetwork& p, int threads) : p_(p) {
        hidden_row_ = padded<T>(p.hidden), product_row_ = padded<T>(9 * p.outputs), output_row_ = padded<T>(p.outputs);
        const int64_t bytes = product_row_ * int64_t(sizeof(T));
        const int64_t pixels = std::min(most_pixels, std::max<int64_t>(2 * tile_rows, most_bytes / bytes));
        const int64_t pieces = (p.columns + pixels - 1) / pixels;
        wide_ = (p.columns + pieces - 1) / pieces;
        tall_ = std::max<int64_t>(1, pixels / wide_);
        divide(threads);
        w1_ = {9 * p.pass_through, p.hidden, nullptr}, w2_ = {p.hidden, p.hidden, nullptr},
        w3_ = {p.hidden, 9 * p.outputs, nullptr};
    }

    void run(int threads) {
        using Buffer = Scratch<T, 1>;
        Buffer scratch(Buffer::rounded(w1_.elements()) + Buffer::rounded(w2_.elements()) + Buffer::rounded(w3_.elements()) +
                       Buffer::rounded(hidden_row_) + Buffer::rounded(output_row_));
        w1_.data = scratch.take(w1_.elements()), w2_.data = scratch.take(w2_.elements());
        w3_.data = scratch.take(w3_.elements());
        b2_ = scratch.take(hidden_row_), b3_ = scratch.take(output_row_);
        pack(threads);
        const int64_t macs = 9 * p_.pass_through * p_.hidden + p_.hidden * p_.hidden + 9 * p_.hidden * p_.outputs;
        parallel(p_.batch * bands_, p_.batch * p_.rows * p_.columns * macs / 20, threads, [&](int64_t item) {
            const int64_t band = item % bands_;
            this->band(item / bands_, band * p_.rows / bands_, (band + 1) * p_.rows / bands_);
        });
    }

  private:
    // Chooses the number of bands that leaves the busiest thread least to do: a band needs h2 of two rows beyond its own.
    void divide(int threads) {
        bands_ = 1;
        int64_t least = -1;
        for (int64_t bands = 1; bands <= std::min<int64_t>(p_.rows, threads); ++bands) {
            const int64_t items = (p_.batch * bands + threads - 1) / threads;
            const int64_t rows = items * ((p_.rows + bands - 1) / bands + std::min<int64_t>(2, bands - 1));
            if (least < 0 || rows < least) least = rows, bands_ = bands;
        }
    }

    void pack(int threads) {
        const T *w1 = reinterpret_cast<const T*>(p_.w1), *w2 = reinterpret_cast<const T*>(p_.w2);
        const T* w3 = reinterpret_cast<const T*>(p_.w3);
        const int64_t pass_through = p_.pass_through, hidden = p_.hidden, outputs = p_.outputs;
        constexpr int64_t some = Panels<T>::together;  // channels of an item, whose w3 fits in the first-level cache
        const int64_t hidden_items = (hidden + some - 1) / some, items = hidden_items + (outputs + some - 1) / some;
        parallel(items, w1_.elements() + w2_.elements() + w3_.elements(), threads, [&](int64_t item) {
            if (item < hidden_items) {
                const int64_t c = item * some, count = std::min(some, hidden - c);
                for (int64_t tap = 0; tap < 9 && pass_through; ++tap)
                    w1_.fill(tap * pass_through, pass_through, c, count, w1 + c * pass_through * 9 + tap, 9, pass_through * 9);
                w2_.fill(0, hidden, c, count, w2 + c * hidden, 1, hidden);
            } else {
                const int64_t c = (item - hidden_items) * some, count = std::min(some, outputs - c);
                for (int64_t tap = 0; tap < 9; ++tap)
                    w3_.fill(0, hidden, tap * outputs + c, count, w3 + c * hidden * 9 + tap, 9, hidden * 9);
            }
        });
        std::copy_n(reinterpret_cast<const T*>(p_.b2), hidden, b2_);
        std::copy_n(reinterpret_cast<const T*>(p_.b3), outputs, b3_);
    }

    // Buffers of a thread.
    struct Buffers {
        T *z1, *h1, *h2, *products, *sums;
    };

    // Rows [begin, end) of y.
    void band(int64_t sample, int64_t begin, int64_t end) const {
        const int64_t z1_size = (tall_ + 2) * (wide_ + 2) * p_.pass_through, h_size = tall_ * wide_ * hidden_row_;
        const int64_t products_size = tall_ * wide_ * product_row_, sums_size = 3 * p_.columns * output_row_;
        using Buffer = Scratch<T>;
        Buffer scratch(Buffer::rounded(z1_size) + 2 * Buffer::rounded(h_size) + Buffer::rounded(products_size) +
                       Buffer::rounded(sums_size));
        const Buffers buffers{scratch.take(z1_size), scratch.take(h_size), scratch.take(h_size), scratch.take(products_size),
                              scratch.take(sums_size)};
        const int64_t last = std::min(end + 1, p_.rows);
        int64_t above = 0;  // rows of the piece above, if its pixels are those above this piece
        for (int64_t row = std::max<int64_t>(begin - 1, 0), rows; row < last; row += rows) {
            rows = row < begin || row >= end ? 1 : std::min(tall_, end - row);
            // the row above a band adds to the band with its lower taps alone, the row below with its upper ones
            const int64_t from = row < end ? 0 : 6 * p_.outputs, to = (row < begin ? 3 : 9) * p_.outputs;
            for (int64_t column = 0; column < p_.columns; column += wide_) {
                const Run run{sample, row, column, std::min(wide_, p_.columns - column)};
                hidden(run, rows, above, buffers);
                if (row >= begin && row < end) {  // rows beyond the band are written by another band
                    write_hidden(run, rows, buffers.h1, p_.h1);
                    write_hidden(run, rows, buffers.h2, p_.h2);
                }
                above = wide_ == p_.columns ? rows : 0;
                const int64_t pixels = rows * run.pixels;
                Product<T>{{buffers.h2, hidden_row_, 1}, w3_, buffers.products, product_row_}.run(pixels, from, to);
                for (int64_t r = row; r < row + rows; ++r) {
                    if (column == 0) start_sums(r, buffers.sums);
                    const T* products = buffers.products + (r - row) * run.pixels * product_row_;
                    for (int64_t dy = 0; dy < 3; ++dy)
                        if (r + 1 - dy >= begin && r + 1 - dy < end)
                            add_products(r + 1 - dy, column, run.pixels, products + 3 * dy * p_.outputs, buffers.sums);
                    if (column + run.pixels < p_.columns) continue;
                    if (r > begin) write(sample, r - 1, buffers.sums);
                    if (r == p_.rows - 1 && r < end) write(sample, r, buffers.sums);
                }
            }
        }
    }

    // h1 and h2 of a piece of `rows` rows. pre is read in place if its channels are whole vectors.
    void hidden(const Run& run, int64_t rows, int64_t above, const Buffers& buffers) const {
        const int64_t across = (run.pixels + 2) * p_.pass_through, pixels = rows * run.pixels;
        const bool in_place = p_.pre.channel == 1 && hidden_row_ == p_.hidden;
        if (p_.pass_through) load_z1(run, rows, above, buffers.z1);
        for (int64_t r = 0; r < rows; ++r) {
            T* h1 = buffers.h1 + r * run.pixels * hidden_row_;
            const Run at{run.sample, run.row + r, run.column, run.pixels};
            if (!in_place) load_pixels(h1, hidden_row_, p_.pre, at, p_.hidden);
            Product<T> product{{buffers.z1 + r * across, p_.pass_through, 1}, w1_, h1, hidden_row_};
            product.more = in_place ? address<const T>(p_.pre, at, 0) : h1;
            product.more_row = in_place ? p_.pre.column : hidden_row_;
            product.runs = 3, product.step = across, product.relu = true;
            product.run(run.pixels);
        }
        Product<T> product{{buffers.h1, hidden_row_, 1}, w2_, buffers.h2, hidden_row_, b2_};
        product.relu = true;
        product.run(pixels);
    }

    void write_hidden(const Run& run, int64_t rows, const T* from, const Tensor& h) const {
        for (int64_t r = 0; r < rows && h.data; ++r, from += run.pixels * hidden_row_) {
            T* to = address<T>(h, Run{run.sample, run.row + r, run.column, run.pixels}, 0);
            move(to, h.column, h.channel, from, hidden_row_, 1, run.pixels, p_.hidden);
        }
    }

    // z1 of a piece and of one pixel around the piece, zeros outside the image. The first two rows are the last two of the
    // piece above, if that is in the buffer.
    void load_z1(const Run& run, int64_t rows, int64_t above, T* to) const {
        const int64_t across = (run.pixels + 2) * p_.pass_through;
        const int64_t first = std::max<int64_t>(run.column - 1, 0), last = std::min(run.column + run.pixels + 1, p_.columns);
        if (above) std::copy_n(to + above * across, 2 * across, to);
        for (int64_t i = above ? 2 : 0; i < rows + 2; ++i) {
            const int64_t row = run.row + i - 1;
            T *line = to + i * across, *line_end = line + across;
            T *begin = line + (first - run.column + 1) * p_.pass_through, *end = begin + (last - first) * p_.pass_through;
            if (row < 0 || row >= p_.rows) begin = end = line_end;
            std::fill(line, begin, T(0));
            if (begin < end)
                load_pixels(begin, p_.pass_through, p_.z1, Run{run.sample, row, first, last - first}, p_.pass_through);
            std::fill(end, line_end, T(0));
        }
    }

    T* row_sums(int64_t row, T* sums) const { return sums + row % 3 * p_.columns * output_row_; }

    // Sets the sums of those rows of y to b3 to which this row of h2 is the first to be added.
    void start_sums(int64_t row, T* sums) const {
        for (int64_t r = row ? row + 1 : 0; r <= row + 1; ++r)
            for (int64_t i = 0; i < p_.columns; ++i) std::copy_n(b3_, output_row_, row_sums(r, sums) + i * output_row_);
    }

    // Adds the products of `pixels` pixels of h2 from `column` on to the sums of a row of y, in whole vectors: the lanes beyond
    // the outputs are garbage, which is not used.
    void add_products(int64_t row, int64_t column, int64_t pixels, const T* products, T* sums) const {
        using V = typename Vector<T>::type;
        constexpr int64_t L = Vector<T>::length;
        T* to = row_sums(row, sums);
        const auto add = [&](int64_t c, int64_t begin, int64_t end) {
            const T* from = products + (c - 1 - column) * product_row_;  // tap dx: `dx` pixels further
            for (int64_t o = 0; o < p_.outputs; o += L) {
                V* sum = reinterpret_cast<V*>(to + c * output_row_ + o);
                V total = *sum;
                for (int64_t dx = begin; dx < end; ++dx)
                    total += *reinterpret_cast<const V*>(from + dx * (product_row_ + p_.outputs) + o);
                *sum = total;
            }
        };
        const int64_t last = column + pixels - 1;
        if (column > 0) add(column - 1, 2, 3);
        add(column, 1, pixels > 1 ? 3 : 2);
        for (int64_t c = column + 1; c < last; ++c) add(c, 0, 3);
        if (pixels > 1) add(last, 0, 2);
        if (last + 1 < p_.columns) add(last + 1, 0, 1);
    }

    void write(int64_t sample, int64_t row, T* sums) const {
        T* to = address<T>(p_.y, Run{sample, row, 0, 0}, 0);
        move(to, p_.y.column, p_.y.channel, row_sums(row, sums), output_row_, 1, p_.columns, p_.outputs);
    }
};

template <class T>
void step_network_forward(const StepNetwork& p, int threads) {
    if (p.batch > 0 && p.rows > 0 && p.columns > 0 && p.outputs > 0) StepNetworkKernel<T>(p, threads).run(threads);
}

}  // namespace ncsr::NCSR_ISA
