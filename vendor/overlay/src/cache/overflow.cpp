#include "cache/overflow.h"

#include "ggml-backend.h"

#include <stdexcept>

llama_kv_mixed_overflow::llama_kv_mixed_overflow(const std::vector<llama_kv_mixed_mover::pair> & pairs, uint32_t n_rows) {
    std::map<ggml_backend_buffer_type_t, ggml_context *> ctxs;

    std::vector<llama_kv_mixed_mover::pair> pairs_own;

    for (const auto & p : pairs) {
        ggml_context *& ctx = ctxs[ggml_backend_buffer_get_type(p.src->buffer)];
        if (!ctx) {
            ctx = ggml_init({ /*.mem_size =*/ pairs.size()*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true });
            ctxs_bufs.emplace_back(ctx, nullptr);
        }

        ggml_tensor * t = ggml_new_tensor_2d(ctx, p.src->type, p.src->ne[0], n_rows);

        rows[p.src] = t;
        pairs_own.push_back({ t, p.dst, p.n_rot, p.rot, p.mean });
    }

    for (auto & [ctx, buf] : ctxs_bufs) {
        for (const auto & [buft, c] : ctxs) {
            if (c == ctx.get()) {
                buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(c, buft));
            }
        }
        if (!buf) {
            throw std::runtime_error("no memory for the tokens of the state that go to cold");
        }
    }

    mover = std::make_unique<llama_kv_mixed_mover>(pairs_own, n_rows);
}

bool llama_kv_mixed_overflow::move(const llama_kv_mixed_moves & moves, int n_threads) {
    return mover->move(moves, n_threads, nullptr);
}
