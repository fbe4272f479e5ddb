#include "cache/means.h"

#include "ggml-backend.h"

#include <algorithm>
#include <stdexcept>

llama_kv_mixed_means::llama_kv_mixed_means(const llama_kv_cache & cold, const std::vector<ggml_tensor *> & k, bool no_alloc) :
    n_page((cold.get_size() + LLAMA_KV_MIXED_PAGE - 1)/LLAMA_KV_MIXED_PAGE) {
    std::map<ggml_backend_buffer_type_t, ggml_context *> ctxs;

    for (const ggml_tensor * t : k) {
        ggml_context *& ctx = ctxs[ggml_backend_buffer_get_type(t->buffer)];
        if (!ctx) {
            ctx = ggml_init({ /*.mem_size =*/ k.size()*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true });
            ctxs_bufs.emplace_back(ctx, nullptr);
        }

        layers.push_back(ggml_new_tensor_3d(ctx, GGML_TYPE_F16, t->ne[0], n_page, t->ne[2]));
    }

    for (auto & [ctx, buf] : ctxs_bufs) {
        ggml_backend_buffer_type_t buft = nullptr;
        for (const auto & [cur, c] : ctxs) {
            buft = c == ctx.get() ? cur : buft;
        }

        if (no_alloc) {
            buf.reset(ggml_backend_buft_alloc_buffer(buft, 0));
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf.get();
            }
            continue;
        }

        buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        if (!buf) {
            throw std::runtime_error("failed to allocate buffer for the means of K");
        }

        ggml_backend_buffer_clear(buf.get(), 0);
    }
}

std::vector<uint32_t> llama_kv_mixed_means::get_pages(const std::vector<uint32_t> & cells) {
    std::vector<uint32_t> res;

    for (const uint32_t i : cells) {
        res.push_back(page_of(i));
    }

    std::sort(res.begin(), res.end());
    res.erase(std::unique(res.begin(), res.end()), res.end());

    return res;
}

void llama_kv_mixed_means::copy_stream(uint32_t src, uint32_t dst) {
    std::vector<uint8_t> buf;

    for (ggml_tensor * t : layers) {
        buf.resize(t->nb[2]);
        ggml_backend_tensor_get(t, buf.data(), src*t->nb[2], buf.size());
        ggml_backend_tensor_set(t, buf.data(), dst*t->nb[2], buf.size());
    }
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_mixed_means::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;

    for (const auto & [ctx, buf] : ctxs_bufs) {
        const ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(buf.get());

        const size_t size = ggml_backend_buffer_get_size(buf.get());
        res[buft] += size > 0 ? size : ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft);
    }

    return res;
}

// op of rows and means, page by page; what does not fill its page comes apart
static ggml_tensor * build_by_page(
        ggml_context * ctx, ggml_tensor * rows, ggml_tensor * means, ggml_tensor * (*op)(ggml_context *, ggml_tensor *, ggml_tensor *)) {
    const int64_t n_embd   = rows->ne[0];
    const int64_t n        = rows->ne[1];
    const int64_t n_stream = rows->ne[2];
    const int64_t n_whole  = n/LLAMA_KV_MIXED_PAGE;
    const int64_t n_rest   = n%LLAMA_KV_MIXED_PAGE;

    if (means->type != GGML_TYPE_F32) {
        means = ggml_cast(ctx, means, GGML_TYPE_F32);
    }

    // [n_embd, cells of a page, pages, n_stream], and [n_embd, 1, pages, n_stream]
    const auto build = [&](int64_t first, int64_t n_page, int64_t n_cell) {
        ggml_tensor * part = ggml_view_4d(ctx, rows, n_embd, n_cell, n_page, n_stream,
            rows->nb[1], LLAMA_KV_MIXED_PAGE*rows->nb[1], rows->nb[2], first*LLAMA_KV_MIXED_PAGE*rows->nb[1]);
        ggml_tensor * mean = ggml_view_4d(ctx, means, n_embd, 1, n_page, n_stream,
            means->nb[1], means->nb[1], means->nb[2], first*means->nb[1]);

        return ggml_reshape_3d(ctx, op(ctx, part, mean), n_embd, n_page*n_cell, n_stream);
    };

    ggml_tensor * whole = n_whole > 0 ? build(0,       n_whole, LLAMA_KV_MIXED_PAGE) : nullptr;
    ggml_tensor * rest  = n_rest  > 0 ? build(n_whole, 1,       n_rest)              : nullptr;

    return !rest ? whole : !whole ? rest : ggml_concat(ctx, whole, rest, 1);
}

ggml_tensor * llama_kv_mixed_add_means(ggml_context * ctx, ggml_tensor * rows, ggml_tensor * means) {
    return build_by_page(ctx, rows, means, ggml_add);
}

ggml_tensor * llama_kv_mixed_sub_means(ggml_context * ctx, ggml_tensor * rows, ggml_tensor * means) {
    return build_by_page(ctx, rows, means, ggml_sub);
}
