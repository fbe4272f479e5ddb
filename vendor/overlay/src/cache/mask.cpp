// The mask of a ubatch over [cold | hot], made of those that upstream makes for each side.

#include "cache/kv-cache-mixed.h"

#include <algorithm>
#include <cstring>

// Whether all tokens of a sequence see the same cells of a side: those that it holds of the sequence are older than all of
// these tokens, and nothing that is added depends on distances.
static bool is_seen_alike(const llama_kv_cache & side, const llama_ubatch & ubatch, bool alibi) {
    for (uint32_t i = 0; i < ubatch.n_tokens && !alibi; ++i) {
        if (ubatch.pos[i] <= side.seq_pos_max(ubatch.seq_id[i][0])) {
            return false;
        }
    }
    return !alibi;
}

// rows of n_kv cells, one for each token, side by side at dst
static void set_rows(const llama_kv_cache & side, const ggml_tensor & like, int64_t n_kv, uint8_t * dst, const llama_ubatch & ubatch, bool causal_attn) {
    ggml_tensor mask = like;

    mask.ne[0] = n_kv;
    mask.data  = dst;

    side.set_input_kq_mask(&mask, &ubatch, causal_attn);
}

// the row of token i alone
static void set_row(const llama_kv_cache & side, const ggml_tensor & like, int64_t n_kv, uint8_t * dst, const llama_ubatch & ubatch, uint32_t i, bool causal_attn) {
    std::vector<llama_pos> pos;
    for (uint32_t k = 0; k < ubatch.n_pos; ++k) {
        pos.push_back(ubatch.pos[k*ubatch.n_tokens + i]);
    }

    llama_ubatch token = ubatch;

    token.n_tokens = 1;
    token.pos      = pos.data();
    token.seq_id   = ubatch.seq_id + i;

    ggml_tensor mask = like;

    mask.ne[1] = 1;
    mask.ne[3] = 1;

    set_rows(side, mask, n_kv, dst, token, causal_attn);
}

void llama_kv_cache_mixed::set_mask(ggml_tensor * dst, uint32_t n_cold, const llama_ubatch & ubatch, bool causal_attn) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));

    const size_t size_el  = ggml_type_size(dst->type);
    const size_t size_row = dst->ne[0]*size_el;

    const auto set_side = [&](const llama_kv_cache & side, int64_t offs, int64_t n_kv) {
        uint8_t * rows = (uint8_t *) dst->data + offs*size_el;

        if (n_kv == dst->ne[0] || ubatch.n_tokens == 1) {
            set_rows(side, *dst, n_kv, rows, ubatch, causal_attn);
            return;
        }

        if (is_seen_alike(side, ubatch, hparams.use_alibi)) {
            int64_t first[LLAMA_MAX_SEQ]; // the token whose row is that of a sequence
            std::fill(first, first + LLAMA_MAX_SEQ, -1);

            for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
                int64_t & f = first[ubatch.seq_id[i][0]];
                if (f < 0) {
                    f = i;
                    set_row(side, *dst, n_kv, rows + i*size_row, ubatch, i, causal_attn);
                } else {
                    memcpy(rows + i*size_row, rows + f*size_row, n_kv*size_el);
                }
            }
            return;
        }

        // (kept: memory that is new each time costs more than what is written to it)
        buf_mask.resize(std::max<size_t>(buf_mask.size(), ubatch.n_tokens*n_kv*size_el));
        set_rows(side, *dst, n_kv, buf_mask.data(), ubatch, causal_attn);

        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            memcpy(rows + i*size_row, buf_mask.data() + i*n_kv*size_el, n_kv*size_el);
        }
    };

    if (n_cold > 0) {
        set_side(*kv_cold, 0, n_cold);
    }
    set_side(*this, n_cold, dst->ne[0] - n_cold);
}
