// Q8_0: blocks of 32 values in 34 bytes, as ggml's: a scale (F16), then 32 bytes.

#pragma once

#include "formats/float.h"

namespace {

struct row_q8_0 {
    static constexpr bool scaled = true;
    static constexpr int  size   = 34;

    static V_INLINE vf load(const uint8_t * row, int64_t b, int i) { return v_load_i8(row + b*size + 2 + i*V_LEN); }
};

// What ggml's vector code for x86 gives. Elsewhere a value in the middle of two steps may go to the other one.
V_INLINE void quantize_block_q8_0(const float * x, uint8_t * dst) {
    const block_f32 b(x);

    const float max = b.max([](vf y) { return v_abs(y); });
    const float id  = max != 0.0f ? 127.0f/max : 0.0f;

    store_scale(dst, max/127.0f);

KVM_UNROLL
    for (int i = 0; i < V_BLOCK; ++i) {
        v_store_i8((int8_t *) dst + 2 + i*V_LEN, v_to_int(v_mul(b.v[i], v_set(id))));
    }
}

void quantize_q8_0(const float * x, int64_t n, uint8_t * dst) {
    for (int64_t b = 0; b < n/BLOCK; ++b) {
        quantize_block_q8_0(x + b*BLOCK, dst + b*row_q8_0::size);
    }
}

constexpr llama_kv_mixed_format format_q8_0 = {
    "q8_0", GGML_TYPE_Q8_0, nullptr, quantize_q8_0, expand_float<row_q8_0>, dot_float<row_q8_0>, acc_float<row_q8_0>, 0, nullptr,
};

} // namespace
