// A tile of rows as the kernels walk through it.

#pragma once

#include "formats/rows.h"

namespace {

constexpr int TILE = LLAMA_KV_MIXED_TILE;

using rows = llama_kv_mixed_rows;
using tile = llama_kv_mixed_tile;

static_assert(TILE % (2*V_LEN) == 0 && TILE % BLOCK == 0 && BLOCK % V_LEN == 0, "tiles and blocks are whole vectors");

// the scales of block b in rows [0, n), and the minima where it has some; n rounded up to whole vectors, with zeros: rows
// from n on are not read
template <class row>
V_INLINE void load_scales(const uint8_t * x, size_t nb, int n, int64_t b, float * d, float * min) {
    int j = 0;
    for (; j + V_LEN <= n; j += V_LEN) {
        vi word[4]; // these, and the first values
        v_transpose4(x + j*nb + b*row::size, nb, word);
        v_store(d + j, v_f16_lo(word[0]));
        if constexpr (row::has_min) {
            v_store(min + j, v_f16_hi(word[0]));
        }
    }
    if (j < n) {
        uint8_t rest[2][2*V_LEN] = {};
        for (int i = j; i < n; ++i) {
            memcpy(rest[0] + 2*(i - j), x + i*nb + b*row::size,     2);
            memcpy(rest[1] + 2*(i - j), x + i*nb + b*row::size + 2, 2);
        }
        v_store(d + j, v_load_f16(rest[0]));
        if constexpr (row::has_min) {
            v_store(min + j, v_load_f16(rest[1]));
        }
    }
}

// Fetches the rows of the next tile evenly while one is worked on: a processor has few buffers for cache lines that are on
// their way, and waits when these are taken.
class ahead {
public:
    // n_visits: how often each row of the tile is visited
    V_INLINE ahead(const tile & t, int64_t n_visits) :
        next(t.next), list(t.next_list), n_list(t.n_next_list), n_visits(list ? n_visits*t.n : n_visits) {}

    V_INLINE void visit(int64_t n_rows) {
        if (list) {
            for (n += n_rows*n_list; n >= n_visits; n -= n_visits) {
                const uint8_t * x = next.data + *list++*next.nb;
                prefetch(x);
                for (int64_t i = next.n_bytes - 1; i > 0; i -= 64) {
                    prefetch(x + i);
                }
            }
            return;
        }
        for (n += n_rows; n >= n_visits; n -= n_visits) {
            // where a row begins in the midst of a line, that came with the row before
            for (int64_t i = next.n_bytes - 1; i >= 0; i -= 64) {
                prefetch(next.data + i);
            }
            next.data += next.nb;
        }
    }

private:
    rows            next;
    const int32_t * list;
    const int64_t   n_list;
    const int64_t   n_visits;
    int64_t         n = 0;
};

template <int N>
struct number {
    static constexpr int value = N;
};

// f(number<n>()), n from 1 to MOST: what is a template for every number of rows
template <int MOST, class F>
V_INLINE void with_number(int n, const F & f) {
    if (n == MOST) {
        f(number<MOST>());
    } else if constexpr (MOST > 1) {
        with_number<MOST - 1>(n, f);
    }
}

// n rows in groups of nearly equal size, none above the most that fit in registers: f(number of rows, the first of them)
template <int MOST, class F>
V_INLINE void for_groups(int64_t n, const F & f) {
    const int64_t n_group = (n + MOST - 1)/MOST;
    const int64_t size    = (n + n_group - 1)/n_group;
    for (int64_t r = 0; r < n; r += size) {
        with_number<MOST>((int) (n - r < size ? n - r : size), [&](auto n_rows) { f(n_rows, r); });
    }
}

// A tile whose rows are read in whole vectors of cells: where the last one has fewer, the rows are copied to room, with
// zeros behind them.
V_INLINE tile whole_vectors(const tile & t, uint8_t * room) {
    tile res = t;
    if (t.n % V_LEN != 0) {
        res.data = room;
        res.nb   = t.n_bytes;
        for (int j = 0; j < t.n; ++j) {
            memcpy(room + j*t.n_bytes, t.data + j*t.nb, t.n_bytes);
        }
        const int n = (t.n + V_LEN - 1)/V_LEN*V_LEN;
        memset(room + t.n*t.n_bytes, 0, (n - t.n)*t.n_bytes);
    }
    return res;
}

} // namespace
