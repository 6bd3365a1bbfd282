// The division of an image by the CPU kernels: into tiles of neighbouring pixels, tiles grouped into parts, parts shared out to
// threads.
//
// The division depends on the shapes alone, and every part has its own partial sum: the same input gives the same bits
// whatever the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "core/arithmetic.h"
#include "cpu/memory.h"

namespace ncsr::NCSR_ISA {

constexpr int64_t lanes = 64;  // elements of one turn of a loop: several vectors of any instruction set

struct Tiling {
    Sizes size;
    int64_t pixels, groups, per_row, per_group, per_sample, parts;

    // Tiles of at most `pixels` pixels, each for one of `groups` groups of channels. A part has at least `elements` elements,
    // unless it is the only one, and there are about `most` parts at most: enough for the threads of a large machine.
    Tiling(const Sizes& size, int64_t pixels, int64_t groups, int64_t elements, int64_t most)
        : size(size), pixels(pixels), groups(groups) {
        per_row = (size.columns + pixels - 1) / pixels;
        per_group = per_row * size.rows;
        per_sample = per_group * groups;
        const int64_t all = size.channels * size.rows * size.columns;
        parts = std::min({per_sample, most / std::max<int64_t>(1, size.batch), all / elements});
        parts = std::max<int64_t>(parts, per_sample > 0);
    }

    int64_t items() const { return size.batch * parts; }

    // Calls use(run, group) with every tile of a part.
    template <class Use>
    void tiles(int64_t item, Use use) const {
        const int64_t sample = item / parts, part = item % parts;
        for (int64_t tile = part * per_sample / parts; tile < (part + 1) * per_sample / parts; ++tile) {
            const int64_t at = tile % per_group, column = at % per_row * pixels;
            use(Run{sample, at / per_row, column, std::min(pixels, size.columns - column)}, tile / per_group);
        }
    }
};

// Calls work(item) for every item. `cost` is the time of all items in nanoseconds: a thread is started for each 10 µs.
template <class Work>
void parallel(int64_t items, int64_t cost, int threads, Work work) {
    const int team = int(std::min<int64_t>({int64_t(threads), items, 1 + cost / 10000}));
    (void)team;
// neighbours go to different threads, since the parts of pass-through channels have less to do
#pragma omp parallel for num_threads(team) schedule(static, 1) if (team > 1)
    for (int64_t item = 0; item < items; ++item) work(item);
}

// Buffers of a thread, which stay allocated from call to call; another `Use` has other buffers.
template <class T, int Use = 0>
class Scratch {
  public:
    explicit Scratch(int64_t elements) {
        static thread_local std::vector<T> memory;
        if (int64_t(memory.size()) < elements + 32) memory.resize(size_t(elements + 32));
        next_ = memory.data();
        next_ += (64 - reinterpret_cast<uintptr_t>(next_) % 64) % 64 / sizeof(T);
    }
    T* take(int64_t elements) {
        T* taken = next_;
        next_ += rounded(elements);
        return taken;
    }
    // elements that `take` takes: a multiple of 64, and up to 64 more, which vector loads and stores may run over
    static int64_t rounded(int64_t elements) { return (elements + 127) / 64 * 64; }

  private:
    T* next_;
};

// The log-det of a part in `lanes` partial sums, with one log for a product of `factors_` scales.
template <class T, class M>
class LogDet {
  public:
    explicit LogDet(double eps) {
        // s lies between eps and 1 + eps: as many factors as leave the product a normal number
        const double widest = std::max(std::abs(std::log10(eps)), std::abs(std::log10(1 + eps)));
        factors_ = std::min<int64_t>(8, std::max<int64_t>(1, int64_t(37.0 / std::max(widest, 1e-3))));
        for (int64_t i = 0; i < lanes; ++i) sum_[i] = T(0), product_[i] = T(1);
    }
    void collect(const T* values, int64_t n) {
        if (!M::logdet_of_product) {
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) sum_[i] += values[i];
            return;
        }
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) product_[i] *= values[i];
        if (++pending_ == factors_) flush();
    }
    double total() {
        if (pending_) flush();
        double total = 0;
        for (int64_t i = 0; i < lanes; ++i) total += double(sum_[i]);
        return total;
    }

  private:
    void flush() {
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i) {
            sum_[i] += log_positive(product_[i]);
            product_[i] = T(1);
        }
        pending_ = 0;
    }
    alignas(64) T sum_[lanes];
    alignas(64) T product_[lanes];
    int64_t factors_, pending_ = 0;
};

// y = map(x; first, second) of n elements, of which y may be x; the log-det is added to `logdet`, if there is one.
template <class M, bool inverse, class T>
void apply(int64_t n, const T* x, Pair<const T> h, T eps, T* y, LogDet<T, M>* logdet) {
    alignas(64) T values[lanes];
    for (int64_t start = 0; start < n; start += lanes) {
        const int64_t count = std::min(lanes, n - start);
        const T *px = x + start, *first = h.first + start, *second = h.second + start;
        T* py = y + start;
        if (count == lanes) {  // the loop below with a constant length
#pragma omp simd
            for (int64_t i = 0; i < lanes; ++i) py[i] = M::template apply<inverse>(px[i], first[i], second[i], eps, values[i]);
        } else {
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) py[i] = M::template apply<inverse>(px[i], first[i], second[i], eps, values[i]);
        }
        if (logdet) logdet->collect(values, count);
    }
}

// dx and dh of n elements from dy and g, of which dx may be dy; v is x or, with `from_output`, y.
template <class M, bool inverse, bool from_output, class T>
void apply_backward(int64_t n, const T* dy, T g, const T* v, Pair<const T> h, T eps, T* dx, Pair<T> dh) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
        dx[i] = M::template backward<inverse, from_output>(dy[i], g, v[i], h.first[i], h.second[i], eps, dh.first[i],
                                                           dh.second[i]);
}

// Adds up the partial sums of every sample, in the order of the parts.
template <class T>
void write_logdet(const std::vector<double>& partial, const Tiling& tiling, double sign, char* logdet) {
    for (int64_t sample = 0; sample < tiling.size.batch; ++sample) {
        double total = 0;
        for (int64_t part = 0; part < tiling.parts; ++part) total += partial[size_t(sample * tiling.parts + part)];
        reinterpret_cast<T*>(logdet)[sample] = T(sign * total);
    }
}

}  // namespace ncsr::NCSR_ISA
