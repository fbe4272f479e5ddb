#pragma once

#include "combine.cuh"
#include "copy.cuh"

//
// attention over one part of the cells: a block takes those of one KV head, for 8 or 16 query rows of it
//
// Each stored row is unpacked once, to F16, for all query rows that meet it (the heads of a group, and several tokens); the
// products are the tensor cores': S^T = K Q^T and O^T = V^T P^T, so that unpacked rows are where these take a matrix of 16 rows.
// Warps take tiles of cells in turn and are merged at the end ("online softmax", Milakov & Gimelshein 2018; the split over
// positions is that of Flash-Decoding). Rows are copied to shared memory while those before are computed with. What meets cold
// rows is rotated here; what they give stays rotated until the parts are put together.
//

static __device__ __forceinline__ float kv_slope(const kv_mixed_attend & p, int head) {
    return p.max_bias == 0.0f ? 1.0f : head < p.n_head_log2 ? powf(p.slope_base[0], head + 1) : powf(p.slope_base[1], 2*(head - p.n_head_log2) + 1);
}

// blocks that a multiprocessor has room for, which sets the registers of a thread
#define KV_MIN_BLOCKS (D > 128 ? 1 : NC == 8 ? 3 : 2)

template <int D, int NC, int FK, int FV>
static __device__ __forceinline__ void kv_attend_part(const kv_mixed_attend & p, const kv_mixed_segment & seg, bool is_cold, int split, char * shared) {
    constexpr bool IS_ANY = FK == KV_ANY;

    constexpr int TILE    = kv_tile(D, FK, FV);
    constexpr int N_BLOCK = D/32;
    constexpr int N_COL   = NC/8;   // groups of 8 query rows
    constexpr int N_CELL  = TILE/16; // groups of 16 cells

    const int tid  = threadIdx.x;
    const int warp = tid/32;
    const int lane = tid%32;
    const int g    = lane/4;
    const int t    = lane%4;

    const int n_col_block = (p.n_col + NC - 1)/NC;
    const int head_kv     = blockIdx.y/n_col_block;
    const int col0        = blockIdx.y%n_col_block*NC;
    const int stream      = blockIdx.z;

    const int ld_k = kv_row_size(IS_ANY ? seg.format_k : FK, D);
    const int ld_v = kv_row_size(IS_ANY ? seg.format_v : FV, D);

    // as unpacking finds them
    constexpr int UK = IS_ANY ? KV_F16 : FK;
    constexpr int UV = IS_ANY ? KV_F16 : FV;
    constexpr int LD_K = kv_row_size(UK, D);
    constexpr int LD_V = kv_row_size(UV, D);

    constexpr int N_STAGE = kv_n_stage(FK, FV);
    const int     stage   = kv_stage_size(D, TILE, ld_k, ld_v);

    char * queries = shared;
    char * stages  = shared + NC*kv_query_row(D) + warp*kv_warp_size(D, FK, FV, ld_k, ld_v);

    const char * k = seg.k + stream*seg.nb_k[2] + head_kv*seg.nb_k[0];
    const char * v = seg.v + stream*seg.nb_v[2] + head_kv*seg.nb_v[0];

    const char * mean = is_cold && p.mean ? p.mean + stream*p.nb_mean[2] + head_kv*p.nb_mean[0] : nullptr;

    const int tile_end = min((split + 1)*seg.n_tile, (seg.n_kv + TILE - 1)/TILE);

    const auto copy = [&](int tile, int i_stage) {
        char * dst = stages + i_stage*stage;

        const int n = seg.n_kv - tile*TILE;

        kv_copy_rows<D, FK, TILE>(seg.format_k, seg.copy_k, dst,             k + int64_t(tile)*TILE*seg.nb_k[1], seg.nb_k[1], n, lane);
        kv_copy_rows<D, FV, TILE>(seg.format_v, seg.copy_v, dst + TILE*ld_k, v + int64_t(tile)*TILE*seg.nb_v[1], seg.nb_v[1], n, lane);
        if (mean && lane < D/8) {
            copy_async<16>(dst + TILE*(ld_k + ld_v) + 16*lane, mean + tile*TILE/KV_PAGE*p.nb_mean[1] + 16*lane, true);
        }
    };

    const int first = split*seg.n_tile + warp;
    if (first < tile_end) {
        copy(first, 0);
    }
    copy_commit();

    // queries: scaled, rotated, as F16, in the order of unpack_k()
    const float scale = p.softcap == 0.0f ? p.scale*KV_LOG2E : p.scale/p.softcap;
    // a value's place among the 8 of its thread: (0, 2), (1, 3), and so on 16 behind
    const int to = lane%16/4*8 + lane/16*4 + (lane%4 & 1)*2 + lane%4/2;

    constexpr int N_QUERY = (NC + KV_N_WARP - 1)/KV_N_WARP;

    float x[N_QUERY][N_BLOCK];
#pragma unroll
    for (int j = 0; j < N_QUERY; ++j) {
        const int col = col0 + warp + j*KV_N_WARP;
        const char * from = p.q + stream*p.nb_q[2] + col/p.n_gqa*p.nb_q[1] + (head_kv*p.n_gqa + col%p.n_gqa)*p.nb_q[0];
#pragma unroll
        for (int i = 0; i < N_BLOCK; ++i) {
            x[j][i] = col < p.n_col ? *(const float *) (from + (32*i + lane)*sizeof(float)) : 0.0f;
        }
    }
#pragma unroll
    for (int j = 0; j < N_QUERY; ++j) {
        const int c = warp + j*KV_N_WARP;
        if (col0 + c < p.n_col) {
            kv_rotate(x[j], is_cold ? p.n_rot[0] : 0, lane);
        }
#pragma unroll
        for (int i = 0; i < N_BLOCK; ++i) {
            if (c < NC) {
                *(uint16_t *) (queries + c*kv_query_row(D) + 2*(32*i + to)) = (uint16_t) h2_make(x[j][i]*scale, 0.0f);
            }
        }
    }
    __syncthreads();

    // of query row g, in each group of these
    const auto load_query = [&](int b, h2 (&q)[N_COL][2][2]) {
#pragma unroll
        for (int c = 0; c < N_COL; ++c) {
            const uint4 x = *(const uint4 *) (queries + (8*c + g)*kv_query_row(D) + 64*b + 16*t);
            q[c][0][0] = x.x; q[c][0][1] = x.y;
            q[c][1][0] = x.z; q[c][1][1] = x.w;
        }
    };
    h2 q[D <= 128 ? N_BLOCK : 1][N_COL][2][2];
    if constexpr (D <= 128) {
#pragma unroll
        for (int b = 0; b < N_BLOCK; ++b) {
            load_query(b, q[b]);
        }
    }

    // what this thread's query rows, 2t and 2t + 1, are masked by: those of cell g and on
    const char * mask[N_COL][2];
    float slope[N_COL][2];
#pragma unroll
    for (int c = 0; c < N_COL; ++c) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int col = min(col0 + 8*c + 2*t + e, p.n_col - 1);
            mask [c][e] = p.mask + stream*p.nb_mask[1] + col/p.n_gqa*p.nb_mask[0] + 2*(seg.first + g);
            slope[c][e] = kv_slope(p, head_kv*p.n_gqa + col%p.n_gqa)*KV_LOG2E;
        }
    }

    float o[D/16][N_COL][4] = {}; // O^T: values 2g or 2g + 16, and so on, of query rows 2t and 2t + 1
    float m[N_COL][2], sum[N_COL][2] = {};
#pragma unroll
    for (int c = 0; c < N_COL; ++c) {
        m[c][0] = m[c][1] = KV_LOWEST;
    }

    // two cells, g and g + 8, of each 16 of a tile
    const auto load_mask = [&](int tile, uint32_t (&res)[N_CELL][N_COL][2]) {
        const bool whole = (tile + 1)*TILE <= seg.n_kv;
#pragma unroll
        for (int c = 0; c < N_COL; ++c) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const char * from = mask[c][e] + 2*tile*TILE;
#pragma unroll
                for (int j = 0; j < N_CELL; ++j) {
                    if (c + e > 0 && p.n_tokens == 1) {
                        res[j][c][e] = res[j][0][0];
                    } else if (whole) {
                        res[j][c][e] = read16(from + 32*j) | read16(from + 32*j + 16) << 16;
                    } else {
                        const int cell = tile*TILE + 16*j + g;
                        res[j][c][e] = (cell < seg.n_kv ? read16(from + 32*j) : 0xFC00) | (cell + 8 < seg.n_kv ? read16(from + 32*j + 16) : 0xFC00) << 16;
                    }
                }
            }
        }
    };

    uint32_t bias[N_CELL][N_COL][2], bias_next[N_CELL][N_COL][2];
    if (first < tile_end) {
        load_mask(first, bias_next);
    }

    int i_stage = 0;
    for (int tile = first; tile < tile_end; tile += KV_N_WARP) {
        uint32_t all = 0xFFFFFFFF;
#pragma unroll
        for (int j = 0; j < N_CELL; ++j) {
#pragma unroll
            for (int c = 0; c < N_COL; ++c) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    bias[j][c][e] = bias_next[j][c][e];
                    all &= bias[j][c][e] ^ 0x03FF03FF;
                }
            }
        }
        if (tile + KV_N_WARP < tile_end) {
            load_mask(tile + KV_N_WARP, bias_next);
            if (N_STAGE > 1) {
                copy(tile + KV_N_WARP, i_stage ^ 1);
            }
        }
        if (N_STAGE > 1) {
            copy_commit();
        }

        copy_wait<(N_STAGE > 1 ? 1 : 0)>();
        __syncwarp();

        // (-inf for all: a tile that no query row sees)
        if (__any_sync(0xFFFFFFFF, all != 0xFFFFFFFF)) {
            const char * rows_k = stages + i_stage*stage;
            const char * rows_v = rows_k + TILE*ld_k;
            const char * means  = rows_v + TILE*ld_v;

            if constexpr (IS_ANY) {
                char * dst = stages + stage;
                kv_convert<D, TILE>(seg.format_k, rows_k, ld_k, dst,                 lane);
                kv_convert<D, TILE>(seg.format_v, rows_v, ld_v, dst + TILE*LD_K, lane);
                rows_k = dst;
                rows_v = dst + TILE*LD_K;
                __syncwarp();
            }

            float s[N_CELL][N_COL][4] = {}; // S^T: cells g and g + 8, query rows 2t and 2t + 1
#pragma unroll
            for (int b = 0; b < N_BLOCK; ++b) {
                if constexpr (D > 128) {
                    load_query(b, q[0]);
                }
                const auto & y = q[D > 128 ? 0 : b];

                const h2 zero[4] = {};
                h2 mean_b[4] = {};
                if (mean) {
                    unpack_k<KV_F16, 4>(means, b, t, zero, mean_b);
                }
#pragma unroll
                for (int j = 0; j < N_CELL; ++j) {
                    h2 x[2][4];
                    unpack_k<UK, 4>(rows_k + (16*j + g    )*LD_K, b, t, mean_b, x[0]);
                    unpack_k<UK, 4>(rows_k + (16*j + g + 8)*LD_K, b, t, mean_b, x[1]);
#pragma unroll
                    for (int c = 0; c < N_COL; ++c) {
                        mma(s[j][c], x[0][0], x[1][0], x[0][1], x[1][1], y[c][0][0], y[c][0][1]);
                        mma(s[j][c], x[0][2], x[1][2], x[0][3], x[1][3], y[c][1][0], y[c][1][1]);
                    }
                }
            }

            // scores, and their maximum
            float top[N_COL][2];
            bool grown = false;
#pragma unroll
            for (int c = 0; c < N_COL; ++c) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    top[c][e] = KV_LOWEST;
#pragma unroll
                    for (int j = 0; j < N_CELL; ++j) {
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            float & x = s[j][c][2*i + e];
                            if (p.softcap != 0.0f) {
                                x = p.softcap*KV_LOG2E*tanhf(x);
                            }
                            x += slope[c][e]*half_to_float(i == 0 ? bias[j][c][e] & 0xFFFF : bias[j][c][e] >> 16);
                            top[c][e] = fmaxf(top[c][e], x);
                        }
                    }
#pragma unroll
                    for (int h = 4; h < 32; h *= 2) {
                        top[c][e] = fmaxf(top[c][e], __shfl_xor_sync(0xFFFFFFFF, top[c][e], h));
                    }
                    grown |= top[c][e] > m[c][e];
                }
            }
            if (__any_sync(0xFFFFFFFF, grown)) {
#pragma unroll
                for (int c = 0; c < N_COL; ++c) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float m_new = fmaxf(m[c][e], top[c][e]);
                        const float f     = exp2f(m[c][e] - m_new);
                        m  [c][e]  = m_new;
                        sum[c][e] *= f;
#pragma unroll
                        for (int i = 0; i < D/16; ++i) {
                            o[i][c][e    ] *= f;
                            o[i][c][e + 2] *= f;
                        }
                    }
                }
            }

#pragma unroll
            for (int j = 0; j < N_CELL; ++j) {
                h2 w[N_COL][2]; // P^T: weights of query row g, of cells 2t and 2t + 1, and of those 8 behind
#pragma unroll
                for (int c = 0; c < N_COL; ++c) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const float x = exp2f(s[j][c][2*i    ] - m[c][0]);
                        const float y = exp2f(s[j][c][2*i + 1] - m[c][1]);
                        sum[c][0] += x;
                        sum[c][1] += y;
                        w[c][i] = transpose(h2_make(x, y));
                    }
                }

                const char * row = rows_v + (16*j + 2*t)*LD_V;
#pragma unroll
                for (int b = 0; b < N_BLOCK; ++b) {
                    h2 x[2][4];
                    unpack_v<UV>(row,          row +   LD_V, b, g, x[0]);
                    unpack_v<UV>(row + 8*LD_V, row + 9*LD_V, b, g, x[1]);
#pragma unroll
                    for (int c = 0; c < N_COL; ++c) {
                        mma(o[2*b    ][c], x[0][0], x[0][1], x[1][0], x[1][1], w[c][0], w[c][1]);
                        mma(o[2*b + 1][c], x[0][2], x[0][3], x[1][2], x[1][3], w[c][0], w[c][1]);
                    }
                }
            }
        }

        __syncwarp();

        if (N_STAGE > 1) {
            i_stage ^= 1;
        } else if (tile + KV_N_WARP < tile_end) {
            copy(tile + KV_N_WARP, 0);
            copy_commit();
        }
    }

#pragma unroll
    for (int c = 0; c < N_COL; ++c) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int h = 4; h < 32; h *= 2) {
                sum[c][e] += __shfl_xor_sync(0xFFFFFFFF, sum[c][e], h);
            }
        }
    }

    // the warps' results, in the memory of the rows
    copy_wait<0>();
    __syncthreads();

    constexpr int LD = kv_merge_row(D);

    float  * outs  = (float *) shared;                          // [KV_N_WARP][NC][LD]
    float2 * metas = (float2 *) (outs + KV_N_WARP*NC*LD);       // [KV_N_WARP][NC]
#pragma unroll
    for (int c = 0; c < N_COL; ++c) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int col = warp*NC + 8*c + 2*t + e;
            if (g == 0) {
                metas[col] = make_float2(m[c][e], sum[c][e]);
            }
#pragma unroll
            for (int b = 0; b < N_BLOCK; ++b) {
                *(float2 *) (outs + col*LD + 32*b +      2*g) = make_float2(o[2*b][c][e    ], o[2*b + 1][c][e    ]);
                *(float2 *) (outs + col*LD + 32*b + 16 + 2*g) = make_float2(o[2*b][c][e + 2], o[2*b + 1][c][e + 2]);
            }
        }
    }
    __syncthreads();

    const int n_split = p.seg[0].n_split + p.seg[1].n_split;
    const int i_split = is_cold ? split : p.seg[0].n_split + split;

    for (int c = warp; c < NC && col0 + c < p.n_col; c += KV_N_WARP) {
        float m_all = KV_LOWEST;
#pragma unroll
        for (int w = 0; w < KV_N_WARP; ++w) {
            m_all = fmaxf(m_all, metas[w*NC + c].x);
        }

        float x[N_BLOCK] = {};
        float sum_all = 0.0f;
#pragma unroll
        for (int w = 0; w < KV_N_WARP; ++w) {
            const float f = exp2f(metas[w*NC + c].x - m_all);
            sum_all += f*metas[w*NC + c].y;
#pragma unroll
            for (int i = 0; i < N_BLOCK; ++i) {
                x[i] += f*outs[(w*NC + c)*LD + 32*i + lane];
            }
        }

        const int64_t part = ((int64_t(stream)*p.n_head_kv + head_kv)*p.n_col + col0 + c)*n_split + i_split;
#pragma unroll
        for (int i = 0; i < N_BLOCK; ++i) {
            p.parts[part*D + 32*i + lane] = x[i];
        }
        if (lane == 0) {
            p.meta[part] = make_float2(m_all, sum_all);
        }
    }
}

// grid: blocks of hot cells, then of cold ones; KV heads, each with its groups of NC query rows; streams
// FK, FV, FH: formats of cold K and V, and of hot rows; or all KV_ANY
template <int D, int NC, int FK, int FV, int FH>
__launch_bounds__(32*KV_N_WARP, KV_MIN_BLOCKS)
static __global__ void kv_attend(const kv_mixed_attend p) {
    KV_SHARED(shared);

    kv_wait();
    kv_start_next();

    const int n_hot = p.seg[1].n_split;

    if ((int) blockIdx.x < n_hot) {
        kv_attend_part<D, NC, FH, FH>(p, p.seg[1], false, blockIdx.x, shared);
    } else {
        kv_attend_part<D, NC, FK, FV>(p, p.seg[0], true, blockIdx.x - n_hot, shared);
    }
}

// blocks of so much shared memory; tile: cells of a tile, cold and hot
template <int D, int NC, int FK, int FV, int FH>
inline int kv_attend_shared(const kv_mixed_attend & p, int (&tile)[2]) {
    const int formats[2][2] = { { FK, FV }, { FH, FH } };

    int res = 0;
    for (int i = 0; i < 2; ++i) {
        const auto * f = formats[i];
        tile[i] = kv_tile(D, f[0], f[1]);
        res = std::max(res, kv_shared_size(D, NC, kv_warp_size(D, f[0], f[1], kv_row_size(p.seg[i].format_k, D), kv_row_size(p.seg[i].format_v, D))));
    }
    return res;
}
