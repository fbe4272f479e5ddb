#include "attention/attention.h"

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

static const int64_t tile_size = 128;

// as many tasks as keep the threads of a large machine busy to the end
static const int64_t n_task_wanted = 64;

// Rows of several heads share cache lines. Such heads are worked on together, tile by tile, as many as leave room in the
// second cache level for their next tile, and where there are so many tasks then. More than the larger number are not worth
// their merge.
static const int64_t max_tile_bytes    = 160*1024;
static const int64_t min_tasks_grouped = 16;
static const int64_t max_tasks_grouped = 32;

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

    for (int i = 0; i < 2; ++i) {
        res.row_size[i][0] = ggml_row_size((ggml_type) args.seg[i].type_k, args.n_embd_k);
        res.row_size[i][1] = ggml_row_size((ggml_type) args.seg[i].type_v, args.n_embd_v);
    }

    const int64_t n_tile = div_up(args.seg[0].n_kv, tile_size) + div_up(args.seg[1].n_kv, tile_size);
    const int64_t n_part = args.n_stream*res.n_block*args.n_head_kv; // tasks of one head without a split over cells

    // tiles per chunk for so many tasks, no less than two
    const auto get_n_tile = [&](int64_t n_hpt, int64_t n_task) {
        const int64_t n_chunk = div_up(n_task, n_part/n_hpt);
        return std::max(div_up(n_tile, n_chunk), std::min<int64_t>(n_tile, 2));
    };
    const auto set_split = [&](int64_t n_hpt, int64_t n_tile_chunk) {
        res.n_hpt   = n_hpt;
        res.n_tile  = n_tile_chunk;
        res.n_chunk = n_tile > 0 ? div_up(n_tile, n_tile_chunk) : 1;
        res.n_task  = n_part/n_hpt*res.n_chunk;
    };

    int64_t n_hpt = args.n_head_kv;
    while (n_hpt % 2 == 0 && n_hpt*tile_size*(int64_t) (res.row_size[0][0] + res.row_size[0][1]) > max_tile_bytes) {
        n_hpt /= 2;
    }
    set_split(n_hpt, get_n_tile(n_hpt, max_tasks_grouped));

    if (res.gemm || res.n_task < min_tasks_grouped) {
        set_split(1, get_n_tile(1, n_part >= n_task_wanted/4 ? n_part : n_task_wanted));
    }

    res.ld_k = pad(args.n_embd_k, 32);
    res.ld_v = pad(args.n_embd_v, 32);

    // for the next head of the tile, or the next chunk
    res.n_query = !res.gemm && (res.n_chunk > 1 || res.n_hpt > 1) ? args.n_head_kv : 1;

    if (res.n_chunk > 1) {
        res.n_partial = pad(res.n_rows*(res.ld_v + 2), 16);
    }

    res.n_scratch = pad(res.n_query, 16)                                  // whose queries are there
        + res.n_query*pad(res.n_rows*res.ld_k, 16)                        // Q
        + (res.gemm ? 0 : res.n_query*pad(res.n_rows*pad(res.ld_k, 64)/64*22, 16)) // Q in 8 bits
        + res.n_hpt*(pad(res.n_rows*res.ld_v, 16) + pad(res.n_rows, 16) + res.n_rows*16 + pad(res.n_gqa, 16)) // O, m, s, slope
        + pad(res.n_rows, 16)                                             // pmax
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
                               float * scratch,
                                   int n_threads) {
    memset(scratch, 0xFF, plan.n_query*sizeof(float));

    const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };

    for (int64_t task = take(); task < plan.n_task; task = take()) {
        // most likely the others will take one each before this is done
        kernel.task(args, plan, task, std::min(task + n_threads, plan.n_task), partial, scratch);
    }
}

void llama_kv_mixed_attn_compute(const llama_kv_mixed_attn_kernel & kernel, const llama_kv_mixed_attn_args & args, int n_threads) {
    const auto plan = llama_kv_mixed_attn_make_plan(args);

    std::vector<float> partial(plan.n_partials());
    std::vector<float> scratch(plan.n_scratch*n_threads);

    // work is what a thread takes of it: where not all of them can be started, the others do it
    const auto run = [&](const auto & work) {
        std::vector<std::thread> threads;
        threads.reserve(n_threads - 1);
        try {
            for (int i = 1; i < n_threads; ++i) {
                threads.emplace_back(work, i);
            }
        } catch (const std::exception &) {
        }
        work(0);
        for (auto & thread : threads) {
            thread.join();
        }
    };

    std::atomic<int64_t> next = 0;
    run([&](int i) {
        llama_kv_mixed_attn_run(kernel, args, plan, next, partial.data(), scratch.data() + i*plan.n_scratch, n_threads);
    });

    if (plan.n_partial > 0) {
        const int64_t n_rows = args.n_stream*args.n_tokens*args.n_head;
        next = 0;
        run([&](int) {
            for (int64_t i = next++; i < n_threads; i = next++) {
                kernel.merge(args, plan, partial.data(), n_rows*i/n_threads, n_rows*(i + 1)/n_threads);
            }
        });
    }
}
