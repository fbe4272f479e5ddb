// What a mask says of a tile.

#pragma once

#include "attention/attention.h"
#include "formats/tile.h"

namespace {

using attn_args = llama_kv_mixed_attn_args;
using attn_plan = llama_kv_mixed_attn_plan;

// what a mask says of a token and a tile
enum mask_kind : uint8_t {
    MASK_NONE, // every cell counts as it is
    MASK_SOME,
    MASK_ALL,  // no cell counts
};

// whether n bytes, a multiple of 8, are the same eight over and over
V_INLINE bool is_all(const uint8_t * x, int64_t n, uint64_t value) {
    uint64_t other = 0;
    for (int64_t i = 0; i < n; i += 8) {
        uint64_t y;
        memcpy(&y, x + i, sizeof(y));
        other |= y ^ value;
    }
    return other == 0;
}

// a token's mask over n cells; dst is left as it is for MASK_NONE. Else, as TILE floats: -inf beyond them
V_INLINE mask_kind load_mask(const attn_args & a, int64_t stream, int64_t token, int64_t cell, int n, float * dst) {
    const float inf = INFINITY;

    if (n < TILE) {
        for (int j = 0; j < TILE; ++j) {
            dst[j] = j < n ? 0.0f : -inf;
        }
        if (!a.mask) {
            return MASK_SOME;
        }
    } else if (!a.mask) {
        return MASK_NONE;
    }

    const int64_t nb = a.mask_f16 ? 2 : 4;

    const uint8_t * x = (const uint8_t *) a.mask + token*a.nb_mask[0] + stream*a.nb_mask[1];

    // of the next cells: rows of a mask are far from each other
    for (int64_t i = 0; n == TILE && i < TILE*nb; i += 64) {
        prefetch(x + (cell + TILE)*nb + i);
    }

    if (n == TILE && is_all(x + cell*nb, TILE*nb, 0)) {
        return MASK_NONE;
    }

    if (n == TILE) {
        vf lo = v_set( inf);
        vf hi = v_set(-inf);
        for (int j = 0; j < TILE; j += V_LEN) {
            const vf y = a.mask_f16 ? v_load_f16(x + 2*(cell + j)) : v_load((const float *) x + cell + j);
            v_store(dst + j, y);
            lo = v_min(lo, y);
            hi = v_max(hi, y);
        }
        const float most = v_hmax(hi);
        if (most == -inf) {
            return MASK_ALL;
        }
        return most == 0.0f && v_hmax(v_sub(v_zero(), lo)) == 0.0f ? MASK_NONE : MASK_SOME;
    }

    bool any = false;
    for (int j = 0; j < n; ++j) {
        if (a.mask_f16) {
            const ggml_fp16_t y = load_u16(x + 2*(cell + j));
            dst[j] = ggml_fp16_to_fp32(y);
        } else {
            dst[j] = ((const float *) x)[cell + j];
        }
        any |= dst[j] != -inf;
    }
    return any ? MASK_SOME : MASK_ALL;
}

// the larger of n_seen and the cells up to the last one that counts, in whole vectors where there are as many cells
V_INLINE int count_seen(mask_kind kind, int n, const float * mask, int n_seen) {
    if (kind != MASK_SOME) {
        return kind == MASK_ALL ? n_seen : n;
    }
    int j = (n + V_LEN - 1)/V_LEN*V_LEN;
    while (j > n_seen && v_hmax(v_load(mask + j - V_LEN)) == -INFINITY) {
        j -= V_LEN;
    }
    return j <= n_seen ? n_seen : j < n ? j : n;
}

} // namespace
