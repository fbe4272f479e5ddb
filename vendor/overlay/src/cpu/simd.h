// Vectors of V_LEN floats for the instruction set that the including file is compiled for.
// Everything is file-local: the same names mean other things in other files.

#pragma once

#include "ggml.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(_MSC_VER)
#define V_INLINE __forceinline
#else
#define V_INLINE inline __attribute__((always_inline))
#endif

// an array of vectors lies in registers only when the loops over it are unrolled
#if defined(__GNUC__) && !defined(__clang__)
#define KVM_UNROLL _Pragma("GCC unroll 16")
#elif defined(__clang__)
#define KVM_UNROLL _Pragma("unroll")
#else
#define KVM_UNROLL
#endif

// Compilers reorder the additions to a sum of integers, and copy registers for it. This keeps a sum where it is.
#if defined(__GNUC__) && (defined(KVM_AVX512) || defined(KVM_AVX2))
#define KVM_KEEP(x) __asm__("" : "+v"(x))
#else
#define KVM_KEEP(x) (void) 0
#endif

// Compilers compute the addresses of many rows one by one, and run out of registers. This makes a pointer one to begin with.
#if defined(__GNUC__)
#define KVM_BASE(p) __asm__("" : "+r"(p))
#else
#define KVM_BASE(p) (void) 0
#endif

// Where vectors are arrays, compilers may take several steps of a loop for a vector, and shuffle. This keeps steps apart.
#if defined(__GNUC__) && !defined(KVM_AVX512) && !defined(KVM_AVX2) && !defined(KVM_NEON)
#define KVM_STEP(p) KVM_BASE(p)
#else
#define KVM_STEP(p) (void) 0
#endif

namespace {

V_INLINE uint16_t load_u16(const uint8_t * p) {
    uint16_t res;
    memcpy(&res, p, sizeof(res));
    return res;
}

V_INLINE int32_t load_i32(const void * p) {
    int32_t res;
    memcpy(&res, p, sizeof(res));
    return res;
}

// what nibbles stand for
struct table16 {
    alignas(16) int8_t v[16];
};

// Which of 16 values is nearest, in 32 ranges of -150 to 140: where in a range it changes, and what stands for it on either
// side. The middles between values are further apart than a range is wide. (A middle at a border is in both ranges.)
struct ranges16 {
    static constexpr float factor = 1.0f/9.25f; // range i: x*factor + first is i when rounded
    static constexpr float first  = 16.0f;

    alignas(64) float mid[32];
    alignas(64) float lo [32];
    alignas(64) float hi [32];

    constexpr ranges16(const table16 & values, const table16 & result) : mid(), lo(), hi() {
        for (int i = 0; i < 32; ++i) {
            const float begin = (i - first - 0.5f)/factor - 0.01f;
            int k = 0; // values that come before
            while (k < 15 && (values.v[k] + values.v[k + 1])/2.0f < begin) {
                k++;
            }
            mid[i] = k < 15 ? (values.v[k] + values.v[k + 1])/2.0f : 0.0f;
            lo [i] = result.v[k];
            hi [i] = result.v[k < 15 ? k + 1 : 15];
        }
    }
};

V_INLINE float f32_from_bits(uint32_t bits) {
    float res;
    memcpy(&res, &bits, sizeof(res));
    return res;
}

//
// what each of the files below defines; simd-avx512.h has the comments
//
// V_LEN:        lanes
// vf, vi:       floats, 32-bit integers
// va:           sums of products of small integers, see v_dot
// V_ROWS_DOT:   rows of Q that fit in registers for the dot product with four rows of K
// V_ROWS_DOT8:  the same for V_LEN rows of K in whole numbers
// V_ROWS_ACC:   rows of the output that fit in registers, 32 elements of each
// V_GEMM_ROWS, V_GEMM_VECS: the same for a block of a matrix product
// V_ROWS_INT:   rows of Q that fit in registers for their products with two vectors of cells in whole numbers
// V_FAST_DOT, V_FAST_DOT8: whether v_dot(), v_dot8() are so fast that these products are faster than those of floats
//

} // namespace

#if defined(KVM_AVX512)
#include "cpu/simd-avx512.h"
#elif defined(KVM_AVX2)
#include "cpu/simd-avx2.h"
#elif defined(KVM_NEON)
#include "cpu/simd-neon.h"
#else
#include "cpu/simd-generic.h"
#endif

namespace {

#if !defined(KVM_AVX512)
V_INLINE void v_transpose8(const uint8_t * p, size_t nb, vi res[8]) {
    v_transpose4(p,      nb, res);
    v_transpose4(p + 16, nb, res + 4);
}

// those of V_LEN words whose bits are set, one after the other, in place if need be; dst has room for all
V_INLINE void v_compress(void * dst, const void * src, uint32_t bits) {
    for (uint8_t * y = (uint8_t *) dst; bits != 0; bits &= bits - 1, y += 4) {
        const int32_t x = load_i32((const uint8_t *) src + 4*__builtin_ctz(bits));
        memcpy(y, &x, sizeof(x));
    }
}
#endif

constexpr float LOG2_E = 1.44269504f;

// 2^x, relative error below 3e-7; 0 or less than the smallest normal number where x < -126
V_INLINE vf v_exp2(vf x) {
    vf n;
    const vf f = v_split(x, n);

    // of all polynomials with 1 at 0 the one whose largest relative error is least, 8.3e-8, for 0 <= f <= 1
    vf p = v_set(0.00186713f);
    p = v_fma(p, f, v_set(0.00901703f));
    p = v_fma(p, f, v_set(0.05579991f));
    p = v_fma(p, f, v_set(0.24016445f));
    p = v_fma(p, f, v_set(0.69315131f));
    p = v_fma(p, f, v_set(1.0f));

    return v_ldexp(p, n);
}

V_INLINE vf v_tanh(vf x) {
    const vf y = v_exp2(v_mul(v_set(2.0f*LOG2_E), v_min(v_max(x, v_set(-15.0f)), v_set(15.0f))));
    return v_div(v_sub(y, v_set(1.0f)), v_add(y, v_set(1.0f)));
}

V_INLINE float exp2_1(float x) {
    float res[V_LEN];
    v_store(res, v_exp2(v_set(x)));
    return res[0];
}

// n: a multiple of V_LEN
V_INLINE bool is_finite(const float * x, int64_t n) {
    vf sum = v_zero();
    for (int64_t i = 0; i < n; i += V_LEN) {
        sum = v_fma(v_load(x + i), v_zero(), sum);
    }
    return v_hsum(sum) == 0.0f;
}

// the power of 2 that is 2^x or the next above; x <= 0; at least 2^-100, so that its inverse is no infinity
V_INLINE float pow2_above(float x) {
    const int n = x < -100.0f ? -100 : (int) x; // towards 0
    return f32_from_bits((uint32_t) (n + 127) << 23);
}

V_INLINE void prefetch(const uint8_t * p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 2); // into the second level: the first has no room for two tiles
#else
    (void) p;
#endif
}

} // namespace
