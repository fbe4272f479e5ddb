#pragma once

#include <cstdint>

//
// what the kernels use of the device, beside CUDA's own names
//
// Pairs of F16 values are words: that is what unpacking makes of stored rows, and what the tensor cores take.
//

typedef uint32_t h2;

#ifdef LLAMA_KV_MIXED_EMULATED

#include "cuda_emulation.h"

#else

#include "common.cuh"

#define KV_NOINLINE __noinline__
#define KV_SHARED(name) extern __shared__ __align__(16) char name[]

// until the kernels before this one are done
static __device__ __forceinline__ void kv_wait() { ggml_cuda_pdl_sync(); }

// the next kernel may start, to wait for this one
static __device__ __forceinline__ void kv_start_next() { ggml_cuda_pdl_lc(); }

// (a cast to half or half2 might be a conversion of a number)
static __device__ __forceinline__ half2 to_half2(h2 x)   { half2 res; memcpy(&res, &x, sizeof(res)); return res; }
static __device__ __forceinline__ h2    to_h2   (half2 x) { h2   res; memcpy(&res, &x, sizeof(res)); return res; }

static __device__ __forceinline__ h2    h2_fma (h2 a, h2 b, h2 c) { return to_h2(__hfma2(to_half2(a), to_half2(b), to_half2(c))); }
static __device__ __forceinline__ h2    h2_add (h2 a, h2 b)       { return to_h2(__hadd2(to_half2(a), to_half2(b))); }
static __device__ __forceinline__ h2    h2_sub (h2 a, h2 b)       { return to_h2(__hsub2(to_half2(a), to_half2(b))); }
static __device__ __forceinline__ h2    h2_mul (h2 a, h2 b)       { return to_h2(__hmul2(to_half2(a), to_half2(b))); }
static __device__ __forceinline__ h2    h2_make(float x, float y) { return to_h2(__floats2half2_rn(x, y)); }

static __device__ __forceinline__ float half_to_float(uint16_t x) { return __half2float(__ushort_as_half(x)); }

// bytes that the selector names, of two words
static __device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// (x & MASK) | BITS, (x & MASK) ^ BITS: one instruction, which the compiler makes two of
template <uint32_t MASK, uint32_t BITS>
static __device__ __forceinline__ uint32_t and_or(uint32_t x) {
    uint32_t res;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(res) : "r"(x), "n"(MASK), "n"(BITS));
    return res;
}

template <uint32_t MASK, uint32_t BITS>
static __device__ __forceinline__ uint32_t and_xor(uint32_t x) {
    uint32_t res;
    asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(res) : "r"(x), "n"(MASK), "n"(BITS));
    return res;
}

// c += a b: [16, 16] times [16, 8] of F16, summed up in F32
static __device__ __forceinline__ void mma(float (&c)[4], h2 a0, h2 a1, h2 a2, h2 a3, h2 b0, h2 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// an [8, 8] matrix of F16 with two of a row in each lane, transposed
static __device__ __forceinline__ h2 transpose(h2 x) {
    h2 res;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(res) : "r"(x));
    return res;
}

// N bytes of global memory to shared memory, some time before copy_wait() returns; zeros if not valid
template <int N>
static __device__ __forceinline__ void copy_async(char * dst, const char * src, bool valid) {
    const uint32_t to   = (uint32_t) __cvta_generic_to_shared(dst);
    const int      size = valid ? N : 0;
    if constexpr (N == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(src), "r"(size));
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" :: "r"(to), "l"(src), "n"(N), "r"(size));
    }
}

static __device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// until all but the last N commits are there
template <int N>
static __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

#endif

static __device__ __forceinline__ uint32_t read16(const char * p) { return *(const uint16_t *) p; }
static __device__ __forceinline__ uint32_t read32(const char * p) { return *(const uint32_t *) p; }

// a word that need not be aligned as one
static __device__ __forceinline__ uint32_t read_word(const char * p) { return read16(p) | read16(p + 2) << 16; }

static __device__ __forceinline__ h2 twice(uint32_t x) { return x | x << 16; }
