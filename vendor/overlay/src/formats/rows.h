// Blocks of values as vectors, and their rotation.

#pragma once

#include "cpu/simd.h"
#include "formats/format.h"

namespace {

constexpr int BLOCK = LLAMA_KV_MIXED_BLOCK;

constexpr int V_BLOCK = BLOCK/V_LEN; // vectors of a block

// the vectors of a block of BLOCK values at x
struct block_f32 {
    vf v[V_BLOCK];

    explicit V_INLINE block_f32(const float * x) {
KVM_UNROLL
        for (int i = 0; i < V_BLOCK; ++i) {
            v[i] = v_load(x + i*V_LEN);
        }
    }

    // the largest of f of a value
    template <class F>
    V_INLINE float max(const F & f) const {
        vf res = f(v[0]);
KVM_UNROLL
        for (int i = 1; i < V_BLOCK; ++i) {
            res = v_max(res, f(v[i]));
        }
        return v_hmax(res);
    }
};

// the value of a block at x that is largest in size, with its sign; the first one where there are two; 0 has no sign
V_INLINE float largest(const float * x, const block_f32 & b) {
    const float hi =  b.max([](vf y) { return y; });
    const float lo = -b.max([](vf y) { return v_sub(v_zero(), y); });

    float res = hi > -lo ? hi : lo;
    if (hi == -lo) {
        res = 0.0f;
        for (int i = 0; i < BLOCK && res == 0.0f; ++i) {
            res = x[i] == hi || x[i] == lo ? x[i] : 0.0f;
        }
        res = res == 0.0f ? 0.0f : res;
    }
    return res;
}

V_INLINE void store_scale(uint8_t * dst, float d) {
    const uint16_t x = f16_from_f32(d);
    memcpy(dst, &x, sizeof(x));
}

//
// rotation
//

// x times the orthonormal Walsh-Hadamard matrix in blocks of n values, a power of 2 from V_LEN, by the fast transform:
// value by value the operations of ggml's own. The matrix is its own inverse.
V_INLINE void rotate(float * x, int64_t n_embd, int64_t n) {
    const vf scale = v_set(1.0f/sqrtf((float) n));
    for (int64_t i = 0; i < n_embd; i += V_LEN) {
        v_store(x + i, v_hadamard(v_mul(v_load(x + i), scale)));
    }
    for (int64_t h = V_LEN; h < n; h *= 2) {
        for (int64_t i = 0; i < n_embd; i += 2*h) {
            for (int64_t j = i; j < i + h; j += V_LEN) {
                const vf a = v_load(x + j);
                const vf b = v_load(x + j + h);
                v_store(x + j,     v_add(a, b));
                v_store(x + j + h, v_sub(a, b));
            }
        }
    }
}

} // namespace
