#pragma once

#include "attend.cuh"
#include "join.cuh"
#include "launch.cuh"

#include <map>
#include <mutex>
#include <tuple>

// blocks of a kernel that run at once on all of the device
static int get_n_resident(const void * kernel, int shared) {
    static std::mutex mutex;
    static std::map<std::tuple<int, int, const void *>, int> known;

    const int device = ggml_cuda_get_device();

    std::lock_guard<std::mutex> lock(mutex);

    int & res = known[{ device, shared, kernel }];
    if (res == 0) {
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
        int n = 0;
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, kernel, 32*KV_N_WARP, shared));
        res = std::max(n, 1)*ggml_cuda_info().devices[device].nsm;
    }
    return res;
}

template <int D, int NC, int FK, int FV, int FH>
static void launch_attend(ggml_backend_cuda_context & ctx, kv_mixed_attend & p, int n_stream) {
    const auto kernel = kv_attend<D, NC, FK, FV, FH>;

    int tile[2];
    const int shared = kv_attend_shared<D, NC, FK, FV, FH>(p, tile);

    const int     n_group = p.n_head_kv*((p.n_col + NC - 1)/NC);
    const int64_t n_rows  = int64_t(n_stream)*p.n_head_kv*p.n_col;

    kv_split(p, get_n_resident((const void *) kernel, shared)/(n_group*n_stream), tile, KV_N_WARP);

    const int n_split = p.seg[0].n_split + p.seg[1].n_split;

    ggml_cuda_pool_alloc<float>  parts(ctx.pool(), n_rows*n_split*D);
    ggml_cuda_pool_alloc<float2> meta (ctx.pool(), n_rows*n_split);

    p.parts = parts.get();
    p.meta  = meta .get();

    const kv_mixed_attend & args = p;

    ggml_cuda_kernel_launch(kernel, ggml_cuda_kernel_launch_params(dim3(n_split, n_group, n_stream), dim3(32*KV_N_WARP), shared, ctx.stream()), args);
    CUDA_CHECK(cudaGetLastError());

    ggml_cuda_kernel_launch(kv_combine<D>, ggml_cuda_kernel_launch_params(dim3(n_rows), dim3(32*KV_N_WARP_COMBINE), 0, ctx.stream()), args);
    CUDA_CHECK(cudaGetLastError());
}

// a kernel by what its template is made for; f is called with that
template <int D, int FK, int FV, typename F>
static bool select_if(const kv_mixed_attend & p, const F & f) {
    if (p.seg[0].format_k != FK || p.seg[0].format_v != FV || p.seg[1].format_k != KV_F16 || p.seg[1].format_v != KV_F16) {
        return false;
    }
    if (p.n_col <= 8) {
        f.template operator()<D, 8, FK, FV, KV_F16>();
    } else {
        f.template operator()<D, 16, FK, FV, KV_F16>();
    }
    return true;
}

template <int D, typename F>
static void select(const kv_mixed_attend & p, const F & f) {
    if (!select_if<D, KV_Q4_0,   KV_Q4_0  >(p, f) &&
        !select_if<D, KV_IQ4_NL, KV_IQ4_NL>(p, f) &&
        !select_if<D, KV_Q8_0,   KV_Q8_0  >(p, f)) {
        f.template operator()<D, 16, KV_ANY, KV_ANY, KV_ANY>();
    }
}

struct attend_launcher {
    ggml_backend_cuda_context & ctx;
    kv_mixed_attend           & p;
    int                         n_stream;

    template <int D, int NC, int FK, int FV, int FH>
    void operator()() const {
        launch_attend<D, NC, FK, FV, FH>(ctx, p, n_stream);
    }
};

struct attend_measurer {
    const kv_mixed_attend & p;
    int                   & res;

    template <int D, int NC, int FK, int FV, int FH>
    void operator()() const {
        int tile[2];
        res = kv_attend_shared<D, NC, FK, FV, FH>(p, tile);
    }
};

template <int D>
void kv_launch_attend(ggml_backend_cuda_context & ctx, kv_mixed_attend & p, int n_stream) {
    select<D>(p, attend_launcher{ ctx, p, n_stream });
}

template <int D>
int kv_get_shared(const kv_mixed_attend & p) {
    int res = 0;
    select<D>(p, attend_measurer{ p, res });
    return res;
}

template <int D, int F>
static void launch_join_cold(ggml_backend_cuda_context & ctx, const kv_mixed_join & p, int n_stream) {
    const dim3 blocks(kv_join_n_block<D>(p.n_kv), p.n_head_kv, n_stream);

    ggml_cuda_kernel_launch(kv_join_cold<D, F>, ggml_cuda_kernel_launch_params(blocks, dim3(256), 0, ctx.stream()), p);
}

template <int D>
void kv_launch_join(ggml_backend_cuda_context & ctx, const kv_mixed_join & p, int n_stream, bool is_cold) {
    if (!is_cold) {
        const dim3 blocks((p.n_kv + 7)/8, p.n_head_kv, n_stream);

        ggml_cuda_kernel_launch(kv_join_hot<D>, ggml_cuda_kernel_launch_params(blocks, dim3(256), 0, ctx.stream()), p);
    } else if (p.format == KV_Q4_0) {
        launch_join_cold<D, KV_Q4_0>(ctx, p, n_stream);
    } else if (p.format == KV_IQ4_NL) {
        launch_join_cold<D, KV_IQ4_NL>(ctx, p, n_stream);
    } else {
        launch_join_cold<D, KV_ANY>(ctx, p, n_stream);
    }
    CUDA_CHECK(cudaGetLastError());
}
