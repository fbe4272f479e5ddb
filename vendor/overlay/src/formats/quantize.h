// Rows of floating point numbers to quantised ones, for the instruction set that the including file is compiled for.

#pragma once

#include "attention/attention.h"
#include "formats/rows.h"

#include "ggml.h"

namespace {

V_INLINE void store_scale(uint8_t * dst, float d) {
    const ggml_fp16_t x = ggml_fp32_to_fp16(d);
    memcpy(dst, &x, sizeof(x));
}

// Bit for bit what ggml's quantize_row_q4_0_ref() gives without fused multiplication and addition.
V_INLINE void quantize_block_q4_0(const float * x, uint8_t * dst) {
    const block_f32 b(x);

    const float hi =  b.max([](vf y) { return y; });
    const float lo = -b.max([](vf y) { return v_sub(v_zero(), y); });

    // the value that is largest in size, with its sign; the first one where there are two
    float max = hi > -lo ? hi : lo;
    if (hi == -lo) {
        max = 0.0f;
        for (int i = 0; i < BLOCK && max == 0.0f; ++i) {
            max = x[i] == hi || x[i] == lo ? x[i] : 0.0f;
        }
        max = max == 0.0f ? 0.0f : max; // no negative zero
    }

    const float d  = max/-8;
    const float id = d != 0.0f ? 1.0f/d : 0.0f;

    store_scale(dst, d);

    vi q[V_BLOCK];
KVM_UNROLL
    for (int i = 0; i < V_BLOCK; ++i) {
        q[i] = v_to_int_trunc(v_min(v_add(v_mul(b.v[i], v_set(id)), v_set(8.5f)), v_set(15.0f)));
    }
    v_store_i4(dst + 2, q);
}

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

// the kernel's expand() for a single row with nothing to fetch after it: with that, quantising takes a quarter longer
template <class row>
void load_row(const uint8_t * src, int64_t b0, int64_t n_block, float * dst) {
    for (int64_t b = 0; b < n_block; ++b) {
KVM_UNROLL
        for (int i = 0; i < V_BLOCK; ++i) {
            v_store(dst + b*BLOCK + i*V_LEN, row::load(src, b0 + b, i));
        }
    }
}

void quantize_row(const void * src, int32_t type_src, void * dst, int32_t type_dst, int64_t n, int64_t n_rot) {
    constexpr int64_t n_buf = LLAMA_KV_MIXED_QUANTIZE_MAX_ROT;

    float x[n_buf];

    for (int64_t i = 0; i < n; i += n_buf) {
        const int64_t b0      = i/BLOCK;
        const int64_t n_block = (n - i < n_buf ? n - i : n_buf)/BLOCK;

        switch (type_src) {
            case GGML_TYPE_F16:  load_row<row_f16> ((const uint8_t *) src, b0, n_block, x); break;
            case GGML_TYPE_BF16: load_row<row_bf16>((const uint8_t *) src, b0, n_block, x); break;
            default:             load_row<row_f32> ((const uint8_t *) src, b0, n_block, x); break;
        }

        if (n_rot > 0) {
            rotate(x, n_block*BLOCK, n_rot);
        }

        for (int64_t b = 0; b < n_block; ++b) {
            if (type_dst == GGML_TYPE_Q4_0) {
                quantize_block_q4_0(x + b*BLOCK, (uint8_t *) dst + (b0 + b)*SIZE_Q4);
            } else {
                quantize_block_q8_0(x + b*BLOCK, (uint8_t *) dst + (b0 + b)*SIZE_Q8);
            }
        }
    }
}

} // namespace
