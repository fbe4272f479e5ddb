// What a task leaves of its query rows for the merge.

#pragma once

#include "attention/mask.h"

namespace {

// of a KV head, block and chunk: O [n_rows][ld_v], the sums of weighted rows of V; m [n_rows], the largest scores;
// s [n_rows], the sums of weights, 0 where m is -inf: a row that sees none of the chunk's cells
template <class T>
struct partial_rows {
    T * data;
    int64_t n_rows, ld_v;

    V_INLINE T * O(int64_t r) const { return data + r*ld_v; }
    V_INLINE T & m(int64_t r) const { return data[n_rows*ld_v + r]; }
    V_INLINE T & s(int64_t r) const { return data[n_rows*ld_v + n_rows + r]; }
};

// of all tasks; T: float, or const float
template <class T>
struct partials {
    const attn_args & a;
    const attn_plan & p;

    T * data;

    V_INLINE partial_rows<T> get(int64_t stream, int64_t block, int64_t chunk, int64_t ikv) const {
        return { data + (((stream*p.n_block + block)*p.n_chunk + chunk)*a.n_head_kv + ikv)*p.n_partial, p.n_rows, p.ld_v };
    }

    // the largest score of a query row in chunks [begin, end)
    V_INLINE float get_max(int64_t stream, int64_t block, int64_t begin, int64_t end, int64_t ikv, int64_t r) const {
        float res = -INFINITY;
        for (int64_t c = begin; c < end; ++c) {
            const float m = get(stream, block, c, ikv).m(r);
            res = m > res ? m : res;
        }
        return res;
    }
};

} // namespace
