// Tensors of any strides and dtype, read and written by the CPU kernels as pieces in small dense buffers.
//
// A piece is `count` channels of a run of `pixels` neighbouring pixels of one image row. In the buffer its order is
//   Order::planes  [channel][pixel]  for NCHW: the pixels of a channel are adjacent in memory
//   Order::pixels  [pixel][channel]  for channels-last: the channels of a pixel are
// so that in both layouts a piece is read by copying contiguous memory. Other strides are read element by element.
#pragma once

#include <cstring>
#include <type_traits>

#include "core/half.h"

namespace ncsr::NCSR_ISA {

enum class Order { planes, pixels };

// A tensor of one channel may have either order.
inline Order memory_order(const Tensor& x) { return channels_adjacent(x) ? Order::pixels : Order::planes; }

// The first pixel of a run of neighbouring pixels of a row, and their number.
struct Run {
    int64_t sample, row, column, pixels;
};

// Calls `use` with a null pointer of the C++ type of a dtype.
template <class Use>
void with_type(Dtype dtype, Use use) {
    switch (dtype) {
        case Dtype::float32: return use(static_cast<float*>(nullptr));
        case Dtype::float64: return use(static_cast<double*>(nullptr));
        case Dtype::float16: return use(static_cast<Float16*>(nullptr));
        case Dtype::bfloat16: return use(static_cast<BFloat16*>(nullptr));
    }
}

template <class S>
S* address(const Tensor& x, const Run& run, int64_t channel) {
    return reinterpret_cast<S*>(x.data) + run.sample * x.batch + run.row * x.row + run.column * x.column + channel * x.channel;
}

// A piece in memory as two nested loops, their counts and strides; one loop where the piece is contiguous.
struct Block {
    int64_t outer, inner, outer_stride, inner_stride;
    Block(const Tensor& x, Order order, int64_t channel_stride, int64_t count, int64_t pixels) {
        const bool planes = order == Order::planes;
        outer = planes ? count : pixels;
        inner = planes ? pixels : count;
        outer_stride = planes ? channel_stride : x.column;
        inner_stride = planes ? x.column : channel_stride;
        if (outer_stride == inner * inner_stride) {
            inner *= outer;
            outer = 1;
        }
    }
};

// Copies rows × n numbers, converting their dtype. The lengths that rows of the published models have, all or half of their
// channels or the pixels of a flow step's tile, are known at compile time.
template <int64_t N, class To, class From>
void move_dense(To* to, int64_t to_row, const From* from, int64_t from_row, int64_t rows, int64_t n) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < (N ? N : n); ++j) to[i * to_row + j] = To(from[i * from_row + j]);
}

template <class To, class From>
void move(To* to, int64_t to_row, int64_t to_step, const From* from, int64_t from_row, int64_t from_step, int64_t rows,
          int64_t n) {
    if (to_step != 1 || from_step != 1) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < n; ++j) to[i * to_row + j * to_step] = To(from[i * from_row + j * from_step]);
        return;
    }
    switch (n) {
        case 6: return move_dense<6>(to, to_row, from, from_row, rows, n);
        case 12: return move_dense<12>(to, to_row, from, from_row, rows, n);
        case 24: return move_dense<24>(to, to_row, from, from_row, rows, n);
        case 32: return move_dense<32>(to, to_row, from, from_row, rows, n);
        case 48: return move_dense<48>(to, to_row, from, from_row, rows, n);
        case 64: return move_dense<64>(to, to_row, from, from_row, rows, n);
        case 96: return move_dense<96>(to, to_row, from, from_row, rows, n);
        default: return move_dense<0>(to, to_row, from, from_row, rows, n);
    }
}

// Reads `count` channels from `channel` on. Returns the address of dense values: in the tensor if they are dense there, else in
// `buffer`.
template <class T>
const T* load(T* buffer, const Tensor& x, const Run& run, Order order, int64_t channel, int64_t count) {
    const Block block(x, order, x.channel, count, run.pixels);
    constexpr Dtype own = sizeof(T) == 4 ? Dtype::float32 : Dtype::float64;
    if (x.dtype == own && block.inner_stride == 1 && block.outer == 1) return address<T>(x, run, channel);
    with_type(x.dtype, [&](auto* type) {
        auto* from = address<std::remove_pointer_t<decltype(type)>>(x, run, channel);
        move(buffer, block.inner, 1, from, block.outer_stride, block.inner_stride, block.outer, block.inner);
    });
    return buffer;
}

// The pairs (h[2c], h[2c + 1]) of some channels: the first and the second numbers, each dense.
template <class T>
struct Pair {
    T *first, *second;
};

template <class T>
Pair<const T> load_pairs(Pair<T> buffer, const Tensor& h, const Run& run, Order order, int64_t channel, int64_t count) {
    if (order == Order::planes && count == 1)
        return {load(buffer.first, h, run, order, 2 * channel, 1), load(buffer.second, h, run, order, 2 * channel + 1, 1)};
    const Block block(h, order, 2 * h.channel, count, run.pixels);
    with_type(h.dtype, [&](auto* type) {
        auto* from = address<std::remove_pointer_t<decltype(type)>>(h, run, 2 * channel);
        const bool side_by_side = block.inner_stride == 2 && h.channel == 1;
        for (int64_t o = 0; o < block.outer && side_by_side; ++o) {
            auto* row = from + o * block.outer_stride;
            T *to_first = buffer.first + o * block.inner, *to_second = buffer.second + o * block.inner;
            for (int64_t i = 0; i < block.inner; ++i) {
                to_first[i] = T(row[2 * i]);
                to_second[i] = T(row[2 * i + 1]);
            }
        }
        if (side_by_side) return;
        move(buffer.first, block.inner, 1, from, block.outer_stride, block.inner_stride, block.outer, block.inner);
        move(buffer.second, block.inner, 1, from + h.channel, block.outer_stride, block.inner_stride, block.outer, block.inner);
    });
    return {buffer.first, buffer.second};
}

// The address for dense results of `count` channels: in the tensor where it is dense, else `buffer`, from which `store` copies.
template <class T>
T* place(T* buffer, const Tensor& y, const Run& run, Order order, int64_t channel, int64_t count) {
    const Block block(y, order, y.channel, count, run.pixels);
    constexpr Dtype own = sizeof(T) == 4 ? Dtype::float32 : Dtype::float64;
    return y.dtype == own && block.inner_stride == 1 && block.outer == 1 ? address<T>(y, run, channel) : buffer;
}

// Copies results from the buffer of `place` to the tensor; does nothing where they are there already.
template <class T>
void store(const T* from, const Tensor& y, const Run& run, Order order, int64_t channel, int64_t count) {
    const Block block(y, order, y.channel, count, run.pixels);
    with_type(y.dtype, [&](auto* type) {
        auto* to = address<std::remove_pointer_t<decltype(type)>>(y, run, channel);
        if (reinterpret_cast<const char*>(to) == reinterpret_cast<const char*>(from)) return;
        move(to, block.outer_stride, block.inner_stride, from, block.inner, 1, block.outer, block.inner);
    });
}

// Copies `count` channels from `channel` on; x and y have one dtype.
inline void copy_channels(const Tensor& x, const Tensor& y, const Run& run, Order order, int64_t channel, int64_t count) {
    const Block from(x, order, x.channel, count, run.pixels), to(y, order, y.channel, count, run.pixels);
    with_type(x.dtype, [&](auto* type) {
        using S = std::remove_pointer_t<decltype(type)>;
        const S* source = address<S>(x, run, channel);
        S* target = address<S>(y, run, channel);
        if (from.outer == to.outer) {
            move(target, to.outer_stride, to.inner_stride, source, from.outer_stride, from.inner_stride, to.outer, to.inner);
        } else {  // one of the two is contiguous, and is divided into the rows of the other
            const Block& rows = from.outer > 1 ? from : to;
            const int64_t step = from.outer > 1 ? to.inner_stride : from.inner_stride, row = step * rows.inner;
            if (from.outer > 1)
                move(target, row, step, source, from.outer_stride, from.inner_stride, rows.outer, rows.inner);
            else
                move(target, to.outer_stride, to.inner_stride, source, row, step, rows.outer, rows.inner);
        }
    });
}

template <class T>
Pair<T> place_pairs(Pair<T> buffer, const Tensor& h, const Run& run, Order order, int64_t channel, int64_t count) {
    if (order == Order::pixels || count != 1) return buffer;
    return {place(buffer.first, h, run, order, 2 * channel, 1), place(buffer.second, h, run, order, 2 * channel + 1, 1)};
}

template <class T>
void store_pairs(Pair<T> from, const Tensor& h, const Run& run, Order order, int64_t channel, int64_t count) {
    if (order == Order::planes && count == 1) {
        store(from.first, h, run, order, 2 * channel, 1);
        store(from.second, h, run, order, 2 * channel + 1, 1);
        return;
    }
    const Block block(h, order, 2 * h.channel, count, run.pixels);
    with_type(h.dtype, [&](auto* type) {
        using S = std::remove_pointer_t<decltype(type)>;
        auto* to = address<S>(h, run, 2 * channel);
        const bool side_by_side = block.inner_stride == 2 && h.channel == 1;
        for (int64_t o = 0; o < block.outer && side_by_side; ++o) {
            auto* row = to + o * block.outer_stride;
            const T *from_first = from.first + o * block.inner, *from_second = from.second + o * block.inner;
            for (int64_t i = 0; i < block.inner; ++i) {
                row[2 * i] = S(from_first[i]);
                row[2 * i + 1] = S(from_second[i]);
            }
        }
        if (side_by_side) return;
        move(to, block.outer_stride, block.inner_stride, from.first, block.inner, 1, block.outer, block.inner);
        move(to + h.channel, block.outer_stride, block.inner_stride, from.second, block.inner, 1, block.outer, block.inner);
    });
}

}  // namespace ncsr::NCSR_ISA
