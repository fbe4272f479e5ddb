#include "attention/attention.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <vector>

void llama_kv_mixed_attn_run(
    const llama_kv_mixed_isa & isa,
      const llama_kv_mixed_attn_args & args,
      const llama_kv_mixed_attn_plan & plan,
        llama_kv_mixed_attn_progress & progress,
                               float * partial,
                               float * scratch,
                                   int n_threads) {
    // no queries are kept yet
    for (int64_t i = 0; i < plan.n_query; ++i) {
        memset(plan.layout.kept.get(scratch, i), 0xFF, sizeof(float));
    }

    const auto take = [&] { return progress.next.fetch_add(1, std::memory_order_relaxed); };

    for (int64_t task = take(); task < plan.n_task; task = take()) {
        // those who took these tasks are at work on them, and wait for nobody
        while (task >= plan.n_task_hot && progress.hot.load(std::memory_order_acquire) < plan.n_task_hot) {
            std::this_thread::yield();
        }
        // What this thread will do next is a guess: the others take one task each meanwhile. It is for fetching ahead only.
        isa.attn_task(args, plan, task, std::min(task + n_threads, plan.n_task), partial, scratch);

        if (task < plan.n_task_hot) {
            progress.hot.fetch_add(1, std::memory_order_release);
        }
    }
}

void llama_kv_mixed_attn_compute(const llama_kv_mixed_isa & isa, const llama_kv_mixed_attn_args & args, int n_threads) {
    const auto plan = llama_kv_mixed_attn_make_plan(args);

    std::vector<float> partial(plan.n_partials());
    std::vector<float> scratch(plan.n_scratch()*n_threads);

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

    llama_kv_mixed_attn_progress progress;
    run([&](int i) {
        llama_kv_mixed_attn_run(isa, args, plan, progress, partial.data(), scratch.data() + i*plan.n_scratch(), n_threads);
    });

    if (plan.n_partial > 0) {
        const int64_t n_rows = args.n_stream*args.n_tokens*args.n_head;
        std::atomic<int64_t> next = 0;
        run([&](int) {
            for (int64_t i = next++; i < n_threads; i = next++) {
                isa.attn_merge(args, plan, partial.data(), n_rows*i/n_threads, n_rows*(i + 1)/n_threads);
            }
        });
    }
}
