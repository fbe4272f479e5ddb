// A query in whole numbers of 8 bits.

#pragma once

#include "formats/rows.h"

namespace {

// A block of values with the largest at 127, as ggml's Q8_0: the first 16 to lo, the others to hi. Returns the scale.
V_INLINE float quantize_query(const float * x, int8_t * lo, int8_t * hi, int32_t & sum) {
    const block_f32 b(x);
    const float amax = b.max([](vf y) { return v_abs(y); });

    const vf scale = v_set(amax > 0.0f ? 127.0f/amax : 0.0f);
    vi total = v_izero();
KVM_UNROLL
    for (int j = 0; j < V_BLOCK; ++j) {
        const vi y = v_to_int(v_mul(b.v[j], scale));
        v_store_i8((j*V_LEN < 16 ? lo : hi) + j*V_LEN%16, y);
        total = v_iadd(total, y);
    }
    sum = v_ihsum(total);
    return amax/127.0f;
}

} // namespace
