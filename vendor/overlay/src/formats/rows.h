// Rows of a KV cache as vectors, and what is done to them before they are quantised.

#pragma once

#include "cpu/simd.h"

namespace {

constexpr int BLOCK   = 32; // elements of a quantised block
constexpr int SIZE_Q4 = 18; // bytes of a block: scale, 16 bytes; byte i has elements i (low nibble) and i + 16
constexpr int SIZE_Q8 = 34; // scale, 32 bytes

//
// rows as floats: BLOCK elements at a time, in V_BLOCK vectors
//

constexpr int V_BLOCK = BLOCK/V_LEN;

// load(): vector i of block b, without the block's scale

struct row_f32 {
    static constexpr bool scaled = false;
    static V_INLINE vf load(const uint8_t * row, int64_t b, int i) { return v_load((const float *) row + b*BLOCK + i*V_LEN); }
};

struct row_f16 {
    static constexpr bool scaled = false;
    static V_INLINE vf load(const uint8_t * row, int64_t b, int i) { return v_load_f16(row + 2*(b*BLOCK + i*V_LEN)); }
};

struct row_bf16 {
    static constexpr bool scaled = false;
    static V_INLINE vf load(const uint8_t * row, int64_t b, int i) { return v_load_bf16(row + 2*(b*BLOCK + i*V_LEN)); }
};

struct row_q8_0 {
    static constexpr bool scaled = true;
    static constexpr int  size   = SIZE_Q8;
    static V_INLINE vf load(const uint8_t * row, int64_t b, int i) { return v_load_i8(row + b*size + 2 + i*V_LEN); }
};

struct row_q4_0 {
    static constexpr bool scaled = true;
    static constexpr int  size   = SIZE_Q4;
    static V_INLINE vf load(const uint8_t * row, int64_t b, int i) { return v_load_i4(row + b*size + 2, i); }
};

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
