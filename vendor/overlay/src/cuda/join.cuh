#pragma once

#include "layout.cuh"
#include "rotate.cuh"
#include "unpack.cuh"

//
// rows as F16 numbers, for an attention that knows no other ones: cold rows unpacked, and hot ones rotated as these are
//

// cells of cold rows that a thread works on, all of one page: what it reads of them is on its way at once
#define KV_JOIN_CELLS 4

// cold rows, a quarter of a block of each by a thread
// grid: groups of 256 threads over the quarters of the rows of KV_JOIN_CELLS cells; KV heads; streams
template <int D, int F>
__launch_bounds__(256)
static __global__ void kv_join_cold(const kv_mixed_join p) {
    kv_wait();

    constexpr int N = D/8; // threads to a row

    const int i       = blockIdx.x*256 + threadIdx.x;
    const int cell0   = i/N*KV_JOIN_CELLS;
    const int b       = i%N/4;
    const int t       = i%4;
    const int head_kv = blockIdx.y;
    const int stream  = blockIdx.z;

    if (cell0 >= p.n_kv) {
        return;
    }

    const h2 zero[4] = {};
    h2 mean[4] = {};
    if (p.mean) {
        unpack_k<KV_F16, 4>(p.mean + stream*p.nb_mean[2] + cell0/KV_PAGE*p.nb_mean[1] + head_kv*p.nb_mean[0], b, t, zero, mean);
    }

    const char * src = p.src + stream*p.nb[2] + head_kv*p.nb[0];

    h2 x[KV_JOIN_CELLS][4];
#pragma unroll
    for (int j = 0; j < KV_JOIN_CELLS; ++j) {
        unpack_k<F, 2>(p.format, src + min(cell0 + j, p.n_kv - 1)*p.nb[1], b, t, mean, x[j]);
    }

    char * dst = p.dst + (((int64_t(stream)*p.n_dst + p.first + cell0)*p.n_head_kv + head_kv)*D + 32*b + 4*t)*2;
#pragma unroll
    for (int j = 0; j < KV_JOIN_CELLS; ++j) {
        if (cell0 + j < p.n_kv) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                *(uint2 *) (dst + int64_t(j)*p.n_head_kv*D*2 + 32*h) = make_uint2(permute(x[j][2*h], x[j][2*h + 1], 0x5410), permute(x[j][2*h], x[j][2*h + 1], 0x7632));
            }
        }
    }
}

template <int D>
inline int kv_join_n_block(int n_kv) {
    return ((n_kv + KV_JOIN_CELLS - 1)/KV_JOIN_CELLS*(D/8) + 255)/256;
}

// hot rows, one by each warp
// grid: groups of 8 cells; KV heads; streams
template <int D>
__launch_bounds__(256)
static __global__ void kv_join_hot(const kv_mixed_join p) {
    kv_wait();

    constexpr int N = D/32;

    const int lane    = threadIdx.x%32;
    const int cell    = blockIdx.x*8 + threadIdx.x/32;
    const int head_kv = blockIdx.y;
    const int stream  = blockIdx.z;

    if (cell >= p.n_kv) {
        return;
    }

    const char * src = p.src + stream*p.nb[2] + cell*p.nb[1] + head_kv*p.nb[0];

    float x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const uint32_t y = read16(src + 2*(32*i + lane));
        x[i] = half_to_float(p.format == KV_BF16 ? bf16_to_f16(y) & 0xFFFF : y);
    }
    kv_rotate(x, p.n_rot, lane);

    char * dst = p.dst + ((int64_t(stream)*p.n_dst + p.first + cell)*p.n_head_kv + head_kv)*D*2;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        *(uint16_t *) (dst + 2*(32*i + lane)) = (uint16_t) h2_make(x[i], 0.0f);
    }
}
