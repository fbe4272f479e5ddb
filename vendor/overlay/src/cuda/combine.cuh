#pragma once

#include "params.cuh"
#include "rotate.cuh"

//
// the parts of attention put together
//

#define KV_LOG2E 1.44269504f

// a score below those of all cells that are seen
#define KV_LOWEST (-1e30f)

#define KV_N_WARP_COMBINE 8

// a query row: its parts put together, those of cold cells rotated back
// grid: query rows of all KV heads and streams; 32 threads for each of the shares of the parts
template <int D>
__launch_bounds__(32*KV_N_WARP_COMBINE)
static __global__ void kv_combine(const kv_mixed_attend p) {
    kv_wait();

    constexpr int N = D/32;

    __shared__ float sums[KV_N_WARP_COMBINE][2][D];
    __shared__ float totals[KV_N_WARP_COMBINE];

    const int warp = threadIdx.x/32;
    const int lane = threadIdx.x%32;

    const int64_t row     = blockIdx.x;
    const int     col     = row%p.n_col;
    const int     head_kv = row/p.n_col%p.n_head_kv;
    const int     stream  = row/p.n_col/p.n_head_kv;
    const int     head    = head_kv*p.n_gqa + col%p.n_gqa;
    const int     n_split = p.seg[0].n_split + p.seg[1].n_split;

    const float2 * meta  = p.meta  + row*n_split;
    const float  * parts = p.parts + row*n_split*D;

    float m = p.sinks ? p.sinks[head]*KV_LOG2E : KV_LOWEST;
    for (int i = lane; i < n_split; i += 32) {
        m = fmaxf(m, meta[i].x);
    }
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
        m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFF, m, h));
    }

    float x[2][N] = {};
    float total = 0.0f;
#pragma unroll 4
    for (int s = warp; s < n_split; s += KV_N_WARP_COMBINE) {
        const float f    = exp2f(meta[s].x - m);
        const float cold = s < p.seg[0].n_split ? f : 0.0f;
        const float hot  = s < p.seg[0].n_split ? 0.0f : f;
        total += f*meta[s].y;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float y = parts[s*D + 32*i + lane];
            x[0][i] += cold*y;
            x[1][i] += hot*y;
        }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        sums[warp][0][32*i + lane] = x[0][i];
        sums[warp][1][32*i + lane] = x[1][i];
    }
    if (lane == 0) {
        totals[warp] = total;
    }
    __syncthreads();

    if (warp > 0) {
        return;
    }

    total = p.sinks ? exp2f(p.sinks[head]*KV_LOG2E - m) : 0.0f;
#pragma unroll
    for (int w = 0; w < KV_N_WARP_COMBINE; ++w) {
        total += totals[w];
    }
    const float scale = total > 0.0f ? 1.0f/total : 0.0f; // (a token that sees nothing)

    float y[N] = {};
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int w = 0; w < KV_N_WARP_COMBINE; ++w) {
            y[i] += sums[w][0][32*i + lane];
        }
    }
    kv_rotate(y, p.n_rot[1], lane);

    float * dst = p.dst + ((int64_t(stream)*p.n_tokens + col/p.n_gqa)*p.n_head + head)*D;
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int w = 0; w < KV_N_WARP_COMBINE; ++w) {
            y[i] += sums[w][1][32*i + lane];
        }
        dst[32*i + lane] = y[i]*scale;
    }
}
