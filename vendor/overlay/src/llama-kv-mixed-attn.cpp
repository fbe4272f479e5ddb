#include "llama-kv-mixed-attn.h"

#include "ggml.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

// few query rows: cells are used as they are stored; more: they are expanded first
static const int64_t max_rows_direct = 16;

// as many tasks as keep the threads of a large machine busy to the end
static const int64_t n_task_wanted = 64;

static const int64_t tile_size = 128;

// Quantised rows of the KV heads share cache lines. What a thread takes at once, a chunk's rows of all heads, should
// stay in the second cache level meanwhile; chunks are not made smaller than is worth a merge.
static const int64_t max_chunk_bytes = 512*1024;
static const int64_t min_chunk_tiles = 4;

// chunks from which on threads take them with all their heads: with fewer, some threads would wait for the last ones
static const int64_t min_chunks_whole = 16;

static int64_t div_up(int64_t a, int64_t b) {
    return (a + b - 1)/b;
}

static int64_t pad(int64_t n, int64_t to) {
    return div_up(n, to)*to;
}

bool llama_kv_mixed_attn_supports(int64_t n_embd_k, int64_t n_embd_v, int64_t n_gqa) {
    return n_embd_k <= LLAMA_KV_MIXED_ATTN_MAX_EMBD && n_embd_v <= LLAMA_KV_MIXED_ATTN_MAX_EMBD && n_gqa <= LLAMA_KV_MIXED_ATTN_MAX_ROWS;
}

bool llama_kv_mixed_quantize_supports(int32_t type_src, int32_t type_dst, int64_t n, int64_t n_rot) {
    const bool is_rot = n_rot >= 32 && n_rot <= LLAMA_KV_MIXED_QUANTIZE_MAX_ROT && (n_rot & (n_rot - 1)) == 0 && n % n_rot == 0;

    return (type_src == GGML_TYPE_F16 || type_src == GGML_TYPE_BF16 || type_src == GGML_TYPE_F32)
        && (type_dst == GGML_TYPE_Q4_0 || type_dst == GGML_TYPE_Q8_0)
        && n > 0 && n % 32 == 0 && (n_rot == 0 || is_rot);
}

llama_kv_mixed_attn_plan llama_kv_mixed_attn_make_plan(const llama_kv_mixed_attn_args & args) {
    llama_kv_mixed_attn_plan res = {};

    res.n_gqa = args.n_head/args.n_head_kv;
    res.gemm  = res.n_gqa*args.n_tokens > max_rows_direct;
    res.n_tpb = res.gemm ? LLAMA_KV_MIXED_ATTN_MAX_ROWS/res.n_gqa : args.n_tokens;

    // blocks of nearly equal size
    res.n_block = div_up(args.n_tokens, res.n_tpb);
    res.n_tpb   = div_up(args.n_tokens, res.n_block);
    res.n_rows  = res.n_tpb*res.n_gqa;

    const int64_t n_tile = div_up(args.seg[0].n_kv, tile_size) + div_up(args.seg[1].n_kv, tile_size);
    const int64_t n_part = args.n_stream*res.n_block*args.n_head_kv; // tasks without a split over cells

    // no split where there are tasks enough, nor into less than two tiles
    const int64_t n_chunk = n_part >= n_task_wanted/4 ? 1 : std::min(div_up(n_task_wanted, n_part), n_tile/2);
    res.n_tile  = div_up(n_tile, std::max<int64_t>(n_chunk, 1));
    if (n_chunk > 1) {
        const size_t n_bytes = tile_size*args.n_head_kv*(
            ggml_row_size((ggml_type) args.seg[0].type_k, args.n_embd_k) + ggml_row_size((ggml_type) args.seg[0].type_v, args.n_embd_v));
        res.n_tile = std::min(res.n_tile, std::max<int64_t>(max_chunk_bytes/n_bytes, min_chunk_tiles));
    }
    res.n_chunk = std::max<int64_t>(div_up(n_tile, std::max<int64_t>(res.n_tile, 1)), 1);
    res.n_task  = n_part*res.n_chunk;
    res.n_step  = res.n_chunk >= min_chunks_whole ? args.n_head_kv : 1;

    res.ld_k = pad(args.n_embd_k, 32);
    res.ld_v = pad(args.n_embd_v, 32);

    if (res.n_chunk > 1) {
        res.n_partial = pad(res.n_rows*(res.ld_v + 2), 16);
    }

    res.n_scratch = pad(res.n_rows*res.ld_k, 16)                          // Q
        + (res.gemm ? 0 : pad(res.n_rows*pad(res.ld_k, 64)/64*22, 16))    // Q in 8 bits
        + pad(res.n_rows*res.ld_v, 16) + 2*pad(res.n_rows, 16) + res.n_rows*16 // O, m, pmax, s
        + 48*tile_size + res.n_tpb*tile_size                              // S, mask
        + tile_size*(res.ld_k*(res.gemm ? 2 : 1) + res.ld_v)              // K, its transpose, V
        + 16;

    return res;
}

//
// kernels
//

#if defined(__x86_64__) && defined(__GNUC__)
extern const llama_kv_mixed_attn_kernel llama_kv_mixed_attn_avx512;
extern const llama_kv_mixed_attn_kernel llama_kv_mixed_attn_avx2;
#elif defined(__aarch64__)
extern const llama_kv_mixed_attn_kernel llama_kv_mixed_attn_dotprod;
extern const llama_kv_mixed_attn_kernel llama_kv_mixed_attn_neon;
#endif
extern const llama_kv_mixed_attn_kernel llama_kv_mixed_attn_generic;

// those that this machine runs, best first
static std::vector<const llama_kv_mixed_attn_kernel *> get_kernels() {
    std::vector<const llama_kv_mixed_attn_kernel *> res;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")  && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")) {
        res.push_back(&llama_kv_mixed_attn_avx512);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        res.push_back(&llama_kv_mixed_attn_avx2);
    }
#elif defined(__aarch64__)
#if defined(__APPLE__)
    res.push_back(&llama_kv_mixed_attn_dotprod);
#elif defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) {
        res.push_back(&llama_kv_mixed_attn_dotprod);
    }
#endif
    res.push_back(&llama_kv_mixed_attn_neon);
#endif
    res.push_back(&llama_kv_mixed_attn_generic);
    return res;
}

static const std::vector<const llama_kv_mixed_attn_kernel *> & kernels() {
    static const auto res = get_kernels();
    return res;
}

std::string llama_kv_mixed_attn_get_names() {
    std::string res;
    for (const auto * kernel : kernels()) {
        res += (res.empty() ? "" : " ") + std::string(kernel->name);
    }
    return res;
}

const llama_kv_mixed_attn_kernel * llama_kv_mixed_attn_get_kernel(const char * name) {
    for (const auto * kernel : kernels()) {
        if (!name || strcmp(kernel->name, name) == 0) {
            return kernel;
        }
    }
    return nullptr;
}

void llama_kv_mixed_attn_run(
    const llama_kv_mixed_attn_kernel & kernel,
      const llama_kv_mixed_attn_args & args,
      const llama_kv_mixed_attn_plan & plan,
                std::atomic<int64_t> & next,
                               float * partial,
                               float * scratch) {
    const auto take = [&] { return next.fetch_add(plan.n_step, std::memory_order_relaxed); };

    // Who knows what comes next fetches its rows early. Not towards the end: what one thread holds, others can not take.
    const int64_t n_early = plan.n_task - plan.n_task/4;

    for (int64_t task0 = take(); task0 < plan.n_task;) {
        const bool    early = task0 < n_early;
        const int64_t after = early ? std::min(take(), plan.n_task) : plan.n_task;
        for (int64_t task = task0; task < task0 + plan.n_step; ++task) {
            kernel.task(args, plan, task, task + 1 < task0 + plan.n_step ? task + 1 : after, partial, scratch);
        }
        task0 = early ? after : take();
    }
}

void llama_kv_mixed_attn_compute(const llama_kv_mixed_attn_kernel & kernel, const llama_kv_mixed_attn_args & args, int n_threads) {
    const auto plan = llama_kv_mixed_attn_make_plan(args);

    std::vector<float> partial(plan.n_task*plan.n_partial);
    std::vector<float> scratch(plan.n_scratch*n_threads);

    const auto run = [&](const auto & work) {
        std::vector<std::thread> threads;
        for (int i = 1; i < n_threads; ++i) {
            threads.emplace_back(work, i);
        }
        work(0);
        for (auto & thread : threads) {
            thread.join();
        }
    };

    std::atomic<int64_t> next = 0;
    run([&](int i) {
        llama_kv_mixed_attn_run(kernel, args, plan, next, partial.data(), scratch.data() + i*plan.n_scratch);
    });

    if (plan.n_partial > 0) {
        const int64_t n_rows = args.n_stream*args.n_tokens*args.n_head;
        run([&](int i) {
            kernel.merge(args, plan, partial.data(), n_rows*i/n_threads, n_rows*(i + 1)/n_threads);
        });
    }
}
