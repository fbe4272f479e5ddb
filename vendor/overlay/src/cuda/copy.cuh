#pragma once

#include "layout.cuh"
#include "unpack.cuh"

//
// rows to shared memory
//

// rows of a tile, by a warp: C pieces of N bytes of each, from piece FIRST on
template <int N, int C, int FIRST, int TILE>
static __device__ __forceinline__ void kv_copy_pieces(char * dst, int ld, const char * src, int64_t nb, int lane) {
    // as many lanes to a row as is a power of 2, the rest in the same way
    constexpr int L = C >= 32 ? 32 : C >= 16 ? 16 : C >= 8 ? 8 : C >= 4 ? 4 : C >= 2 ? 2 : 1;
    constexpr int R = 32/L;

    dst += lane/L*ld + (FIRST + lane%L)*N;
    src += lane/L*nb + (FIRST + lane%L)*N;
#pragma unroll
    for (int r = 0; r < TILE; r += R) {
        if (R <= TILE || lane/L < TILE) {
            copy_async<N>(dst + r*ld, src, true);
        }
        src += R*nb;
    }

    if constexpr (C > L) {
        kv_copy_pieces<N, C - L, FIRST + L, TILE>(dst - lane/L*ld - (FIRST + lane%L)*N, ld, src - (TILE + R - 1)/R*R*nb - lane/L*nb - (FIRST + lane%L)*N, nb, lane);
    }
}

// n rows, the others of the tile are zeros; whatever sizes and strides are multiples of
template <int TILE>
static __device__ KV_NOINLINE void kv_copy_any(int n_bytes, char * dst, int ld, const char * src, int64_t nb, int size, int n, int lane) {
    const int n_piece = size/n_bytes;

    for (int i = lane; i < TILE*n_piece; i += 32) {
        const int  row   = i/n_piece;
        const int  pos   = (i - row*n_piece)*n_bytes;
        const bool valid = row < n;
        char       * to   = dst + row*ld + pos;
        const char * from = src + (valid ? row : 0)*nb + pos;

        switch (n_bytes) {
            case 16: copy_async<16>(to, from, valid); break;
            case  8: copy_async< 8>(to, from, valid); break;
            case  4: copy_async< 4>(to, from, valid); break;
            default: *(uint16_t *) to = valid ? *(const uint16_t *) from : 0; break;
        }
    }
}

static constexpr KV_BOTH int kv_alignment(int size) {
    return size%16 == 0 ? 16 : size%8 == 0 ? 8 : size%4 == 0 ? 4 : 2;
}

template <int D, int F, int TILE>
static __device__ __forceinline__ void kv_copy_rows(int format, int n_bytes, char * dst, const char * src, int64_t nb, int n, int lane) {
    if constexpr (F >= 0) {
        constexpr int SIZE = D/32*kv_block_size(F);
        constexpr int N    = kv_alignment(SIZE);

        if constexpr (N > 2) {
            if (n >= TILE && n_bytes >= N) {
                kv_copy_pieces<N, SIZE/N, 0, TILE>(dst, kv_row_size(F, D), src, nb, lane);
                return;
            }
        }
    }
    format = F >= 0 ? F : format;
    kv_copy_any<TILE>(n_bytes, dst, kv_row_size(format, D), src, nb, D/32*kv_block_size(format), n, lane);
}

// rows of any format as F16, in shared memory
template <int D, int TILE>
static __device__ KV_NOINLINE void kv_convert(int format, const char * src, int ld, char * dst, int lane) {
    const h2 zero[4] = {};

    for (int i = lane; i < TILE*D/8; i += 32) {
        const int row = i/(D/8), b = i%(D/8)/4, t = i%4;

        h2 x[4];
        unpack_k<KV_ANY, 4>(format, src + row*ld, b, t, zero, x);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            *(uint2 *) (dst + row*kv_row_size(KV_F16, D) + 64*b + 32*h + 8*t) = make_uint2(permute(x[2*h], x[2*h + 1], 0x5410), permute(x[2*h], x[2*h + 1], 0x7632));
        }
    }
}
