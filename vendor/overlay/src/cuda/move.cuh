#pragma once

#include "rotate.cuh"
#include "unpack.cuh"

//
// rows of hot go to cold: rotated, less their page's mean, quantised
//
// A warp works on one block of values that are rotated together (32 where they are not), a lane on every 32nd of them: each 32
// values are a block of the format, one value in each lane. Scales are ggml's, or searched as on the CPU (formats/search.h).
//

#define KV_MOVE_WARPS 4

#define KV_ALL 0xFFFFFFFF

static __device__ __forceinline__ float kv_sum(float x) {
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
        x += __shfl_xor_sync(KV_ALL, x, h);
    }
    return x;
}

static __device__ __forceinline__ float kv_max(float x) {
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
        x = fmaxf(x, __shfl_xor_sync(KV_ALL, x, h));
    }
    return x;
}

// the value that is largest without its sign, the first of those
static __device__ __forceinline__ float kv_largest(float x) {
    const float most = kv_max(fabsf(x));

    return __shfl_sync(KV_ALL, x, __ffs(__ballot_sync(KV_ALL, fabsf(x) == most)) - 1);
}

// the grids of formats/iq4_nl.h and q4_q5.h: the nearest number to x, and where the largest value of a block is tried
template <int F>
struct kv_grid;

template <>
struct kv_grid<KV_IQ4_NL> {
    // the index of the value nearest to x; values is the table
    static __device__ __forceinline__ int index(float x) {
        // borders between neighbours
        constexpr float borders[15] = { -115.5f, -93.5f, -74.0f, -57.0f, -42.0f, -28.5f, -16.0f, -4.5f, 7.0f, 19.0f, 31.5f, 45.5f, 61.0f, 79.0f, 101.0f };
        int res = 0;
#pragma unroll
        for (int i = 0; i < 15; ++i) {
            res += x > borders[i];
        }
        return res;
    }
    static __device__ __forceinline__ float nearest(float x) {
        return (float) (int) (lookup_iq4_nl(index(x)) & 0xFF) - 128.0f;
    }
    static __device__ __forceinline__ float end(int i) {
        constexpr float ends[16] = { -127, -140, -135, -131, -124.5f, -122, -119.5f, -112, -108, -103, 90, 108, 112, 116, 120, 125 };
        return ends[i];
    }
};

template <>
struct kv_grid<KV_Q5_0> {
    static __device__ __forceinline__ int index(float x) {
        return (int) fminf(fmaxf(x + 16.5f, 0.0f), 31.0f);
    }
    static __device__ __forceinline__ float nearest(float x) {
        return (float) (index(x) - 16);
    }
    static __device__ __forceinline__ float end(int i) {
        constexpr float ends[16] = {
            -16, -16.85f, -16.6f, -16.4f, -16.2f, -15.85f, -15.65f, -15.25f, -15, -14.75f, -14.3f, -14.05f, -13.75f, -13.25f, -12.9f, -12.1f,
        };
        return ends[i];
    }
};

// the scale that leaves the least squared error, of sixteen: a number that F16 has
template <int F>
static __device__ __forceinline__ float kv_search_scale(float x) {
    const float max = kv_largest(x);
    if (fabsf(max) < 1e-15f) {
        return 0.0f;
    }

    float res = 0.0f, most = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const float q = kv_grid<F>::nearest(x*(kv_grid<F>::end(i)/max));

        const float sum_qx = kv_sum(q*x);
        const float sum_qq = kv_sum(q*q);

        const float d    = half_to_float((uint16_t) h2_make(sum_qx/sum_qq, 0.0f));
        const float gain = d*(2.0f*sum_qx - d*sum_qq)*(i == 0 ? 1.0f + 0x1p-16f : 1.0f);
        if (gain > most) {
            most = gain;
            res  = d;
        }
    }
    return res;
}

static __device__ __forceinline__ void kv_quantize_q8_0(float x, char * dst, int lane) {
    const float d  = kv_max(fabsf(x))/127.0f;
    const float id = d != 0.0f ? 1.0f/d : 0.0f;

    const uint32_t q    = (uint32_t) (int) roundf(x*id) & 0xFF;
    const uint32_t next = __shfl_xor_sync(KV_ALL, q, 1);
    if (lane%2 == 0) {
        *(uint16_t *) (dst + 2 + lane) = (uint16_t) (q | next << 8);
    }
    if (lane == 0) {
        *(uint16_t *) dst = (uint16_t) h2_make(d, 0.0f);
    }
}

template <int F>
static __device__ __forceinline__ void kv_quantize_nibbles(float x, char * dst, int lane) {
    float    d;
    uint32_t q;
    if constexpr (F == KV_Q4_0) {
        d = kv_largest(x)/-8.0f;
        q = min(15, (int) (x*(d != 0.0f ? 1.0f/d : 0.0f) + 8.5f));
    } else {
        d = kv_search_scale<F>(x);
        q = kv_grid<F>::index(x*(d != 0.0f ? 1.0f/d : 0.0f));
    }

    // bytes have the values i and i + 16, and are written in pairs
    const uint32_t byte = (q & 15) | (__shfl_xor_sync(KV_ALL, q, 16) & 15) << 4;
    const uint32_t next = __shfl_xor_sync(KV_ALL, byte, 1);
    if (lane < 16 && lane%2 == 0) {
        *(uint16_t *) (dst + kv_offset(F) + lane) = (uint16_t) (byte | next << 8);
    }
    if constexpr (F == KV_Q5_0) {
        const uint32_t high = __ballot_sync(KV_ALL, q >> 4 & 1);
        if (lane < 2) {
            *(uint16_t *) (dst + 2 + 2*lane) = (uint16_t) (high >> 16*lane);
        }
    }
    if (lane == 0) {
        *(uint16_t *) dst = (uint16_t) h2_make(d, 0.0f);
    }
}

// a block of 32 values, one in each lane
template <int F>
static __device__ __forceinline__ void kv_quantize(float x, char * dst, int lane) {
    if constexpr (F == KV_Q8_0) {
        kv_quantize_q8_0(x, dst, lane);
    } else {
        kv_quantize_nibbles<F>(x, dst, lane);
    }
}

// N*32 values of a row of F16 or BF16, from the first on
template <int N>
static __device__ __forceinline__ void kv_load_row(const char * row, int format, int first, int lane, float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const uint32_t y = read16(row + 2*(first + 32*i + lane));
        union { uint32_t u; float f; } bf16;
        bf16.u = y << 16;
        x[i] = format == KV_BF16 ? bf16.f : half_to_float((uint16_t) y);
    }
}

// grid: rows; groups of KV_MOVE_WARPS parts of N*32 values
template <int N, int F>
__launch_bounds__(32*KV_MOVE_WARPS)
static __global__ void kv_move(const kv_mixed_move p) {
    kv_wait();

    const int lane  = threadIdx.x%32;
    const int first = (blockIdx.y*KV_MOVE_WARPS + threadIdx.x/32)*32*N;
    const int i     = blockIdx.x;

    if (first >= p.n_embd) {
        return;
    }

    float x[N];
    kv_load_row(p.from + int64_t(p.row_from[i])*p.n_embd*2, p.format_from, first, lane, x);
    kv_rotate(x, p.n_rot, lane);

    if (p.mean) {
        float y[N];
        kv_load_row(p.mean + int64_t(p.page[i])*p.n_embd*2, KV_F16, first, lane, y);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            x[j] -= y[j];
        }
    }

    char * dst = p.to + (p.row_to[i]*p.n_embd + first)/32*kv_block_size(F);
#pragma unroll
    for (int j = 0; j < N; ++j) {
        kv_quantize<F>(x[j], dst + j*kv_block_size(F), lane);
    }
}

template <int N>
inline int kv_move_n_block(int n_embd) {
    return (n_embd + 32*N*KV_MOVE_WARPS - 1)/(32*N*KV_MOVE_WARPS);
}

// the means of pages, of those of the rows that go there: the sum is rotated. What is not finite, or too large for F16, is 0, as on
// the CPU.
// grid: new pages; parts of N*32 values, each by a whole block
template <int N>
__launch_bounds__(32*KV_MOVE_WARPS)
static __global__ void kv_mean(const kv_mixed_move p) {
    kv_wait();

    __shared__ float sums[KV_MOVE_WARPS][N][32];
    __shared__ int   counts[KV_MOVE_WARPS];

    const int     warp  = threadIdx.x/32;
    const int     lane  = threadIdx.x%32;
    const int     first = blockIdx.y*32*N;
    const int64_t page  = p.row_to[blockIdx.x];

    float sum[N] = {};
    int   n      = 0;
    for (int i0 = 32*warp; i0 < p.n; i0 += 32*KV_MOVE_WARPS) {
        const int  i    = min(i0 + lane, p.n - 1);
        const int  from = p.row_from[i];
        const bool mine = i0 + lane < p.n && p.page[i] == page;

        const unsigned rows = __ballot_sync(KV_ALL, mine);
        n += __popc(rows);
#pragma unroll 8
        for (int j = 0; j < 32; ++j) {
            const int row = __shfl_sync(KV_ALL, from, j);
            if (rows >> j & 1) {
                float x[N];
                kv_load_row(p.from + int64_t(row)*p.n_embd*2, p.format_from, first, lane, x);
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    sum[k] += x[k];
                }
            }
        }
    }

#pragma unroll
    for (int k = 0; k < N; ++k) {
        sums[warp][k][lane] = sum[k];
    }
    if (lane == 0) {
        counts[warp] = n;
    }
    __syncthreads();

    if (warp > 0) {
        return;
    }

#pragma unroll
    for (int w = 1; w < KV_MOVE_WARPS; ++w) {
        n += counts[w];
#pragma unroll
        for (int k = 0; k < N; ++k) {
            sum[k] += sums[w][k][lane];
        }
    }
    kv_rotate(sum, p.n_rot, lane);

#pragma unroll
    for (int k = 0; k < N; ++k) {
        const float y = sum[k]/n;
        *(uint16_t *) (p.to + (page*p.n_embd + first + 32*k + lane)*2) = (uint16_t) h2_make(fabsf(y) <= 65504.0f ? y : 0.0f, 0.0f);
    }
}
