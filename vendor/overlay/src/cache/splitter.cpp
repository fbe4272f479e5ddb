// how a batch is divided into ubatches, and whether it fits

#include "cache/splitter.h"

#include "cache/kv-cache-mixed.h"
#include "cache/params.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"

#include <algorithm>
#include <bitset>
#include <numeric>

llama_kv_mixed_splitter::llama_kv_mixed_splitter(
              const llama_kv_mixed_policy & policy,
         std::vector<llama_kv_mixed_plan>   plans,
                    std::vector<uint32_t>   n_left) : policy(policy), plans(std::move(plans)), left(std::move(n_left)) {
}

void llama_kv_mixed_splitter::place(const std::vector<llama_kv_mixed_share> & shares) {
    for (const auto & sh : shares) {
        fits = fits && plans[sh.strm].place(policy, sh);

        left[sh.strm] -= sh.n;
    }

    n_ubatches++;
}

uint32_t llama_kv_mixed_splitter::n_left() const {
    return std::accumulate(left.begin(), left.end(), 0u);
}

uint32_t llama_kv_mixed_splitter::limit(uint32_t n) const {
    uint32_t res = n;

    // a ubatch goes to hot as a whole, and may be of one stream alone; where all that is left has room a stream sets no limit
    for (size_t s = 0; s < plans.size(); ++s) {
        const uint32_t room = plans[s].room(policy);
        if (left[s] > room) {
            res = std::min(res, room);
        }
    }

    return fits && res > 0 ? res : n;
}

const char * llama_kv_mixed_whole_reason(const llama_cparams & cparams, const llama_hparams & hparams) {
    if (!cparams.causal_attn) {
        return "without causal attention, where its tokens see each other,";
    }

    if (!cparams.embeddings) {
        return nullptr;
    }

    // what is pooled is a ubatch, and the last one's result stays: that is right for the last token alone
    switch (cparams.pooling_type) {
        case LLAMA_POOLING_TYPE_MEAN: return "whose embeddings are pooled (mean)";
        case LLAMA_POOLING_TYPE_CLS:  return "whose embeddings are pooled (cls)";
        case LLAMA_POOLING_TYPE_RANK: return hparams.pooling_type_cls == LLAMA_POOLING_TYPE_MEAN ? "that is ranked by a mean" : nullptr;
        default:                      return nullptr;
    }
}

//
// llama_kv_cache_mixed
//

const char * llama_kv_cache_mixed::get_whole_reason() const {
    return lctx ? llama_kv_mixed_whole_reason(lctx->get_cparams(), hparams) : nullptr;
}

std::vector<llama_kv_mixed_share> llama_kv_cache_mixed::get_shares(const llama_ubatch & ubatch) const {
    const uint32_t n_shares = kv_hot->get_n_stream() == 1 ? 1 : ubatch.n_seqs_unq;
    const uint32_t n        = ubatch.n_tokens/n_shares;

    std::vector<llama_kv_mixed_share> res;

    for (uint32_t s = 0; s < n_shares; ++s) {
        llama_kv_mixed_share sh = { get_stream(ubatch.seq_id_unq[s]), n, {} };

        for (uint32_t i = s*n; i < (s + 1)*n; ++i) {
            if (policy.is_sink(ubatch.pos[i])) {
                sh.sinks.push_back(*std::min_element(ubatch.seq_id[i], ubatch.seq_id[i] + ubatch.n_seq_id[i]));
            }
        }

        res.push_back(std::move(sh));
    }

    return res;
}

const llama_kv_mixed_splitter & llama_kv_cache_mixed::follow(
              const llama_batch_allocr & balloc,
       const std::vector<llama_ubatch> & ubatches) {
    if (ubatches.empty()) {
        std::vector<uint32_t> n_left(n_stream, 0);

        const llama_batch & batch = balloc.get_batch();
        for (int32_t i = 0; i < batch.n_tokens; ++i) {
            n_left[get_stream(batch.seq_id[i][0])]++;
        }

        splitter.emplace(policy, get_plans(), std::move(n_left));
    }

    while (splitter->n_placed() < ubatches.size()) {
        splitter->place(get_shares(ubatches[splitter->n_placed()]));
    }

    return *splitter;
}

uint32_t llama_kv_cache_mixed::get_n_ubatch(
              const llama_batch_allocr & balloc,
       const std::vector<llama_ubatch> & ubatches,
                              uint32_t   n_ubatch,
                              uint32_t   n_tail) {
    const uint32_t res = get_whole_reason() ? n_ubatch : follow(balloc, ubatches).limit(n_ubatch);

    return res <= n_tail ? n_ubatch : res;
}

llama_ubatch llama_kv_cache_mixed::split_simple(
                    llama_batch_allocr & balloc,
       const std::vector<llama_ubatch> & ubatches,
                              uint32_t   n_ubatch) {
    const auto & sp = follow(balloc, ubatches);

    const uint32_t n = sp.limit(n_ubatch);

    return get_whole_reason() && sp.n_left() > n ? balloc.split_seq(n_ubatch) : balloc.split_simple(n);
}

llama_ubatch llama_kv_cache_mixed::split_equal(
                    llama_batch_allocr & balloc,
       const std::vector<llama_ubatch> & ubatches,
                              uint32_t   n_ubatch,
                                  bool   sequential) {
    const uint32_t n = follow(balloc, ubatches).limit(n_ubatch);

    return get_whole_reason() ? balloc.split_seq(n_ubatch) : balloc.split_equal(n, sequential, 0);
}

std::string llama_kv_cache_mixed::get_misfit(const std::vector<llama_ubatch> & ubatches) const {
    const char * whole = get_whole_reason();

    auto plans = get_plans();

    std::bitset<LLAMA_MAX_SEQ> seen;

    for (const auto & ubatch : ubatches) {
        for (uint32_t s = 0; whole && s < ubatch.n_seqs_unq; ++s) {
            const llama_seq_id seq_id = ubatch.seq_id_unq[s];
            if (seen.test(seq_id)) {
                return format("a batch %s has to have all tokens of a sequence in one ubatch, and those of sequence %d are in several: "
                    "set n_ubatch to the tokens of a sequence, and decode sequences that share tokens one by one", whole, seq_id);
            }
            seen.set(seq_id);
        }

        for (const auto & sh : get_shares(ubatch)) {
            auto & plan = plans[sh.strm];

            const uint32_t n_most = policy.n_hot - plan.n_pinned(policy);

            if (plan.place(policy, sh)) {
                continue;
            }

            if (whole && sh.n > n_most) {
                return format("a batch %s has to fit in hot as a whole: %u tokens, and hot=%u has room for %u; set hot=%u",
                    whole, sh.n, policy.n_hot, n_most, (uint32_t) GGML_PAD(sh.n + policy.n_hot - n_most, 256));
            }

            return "the batch does not fit: " + describe_use();
        }
    }

    return "";
}

llama_kv_cache_mixed::slot_info_vec_t llama_kv_cache_mixed::prepare(const std::vector<llama_ubatch> & ubatches) {
    if (is_shift_pending()) {
        return {};
    }

    const std::string misfit = get_misfit(ubatches);

    if (misfit.empty()) {
        return slot_info_vec_t(ubatches.size());
    }

    if (!is_refused) {
        is_refused = true;

        n_refused++;

        if (trace->is_on()) {
            auto event = make_event(LLAMA_KV_MIXED_EVENT_REFUSE, -1);
            for (const auto & ubatch : ubatches) {
                event.n_tokens += ubatch.n_tokens;
            }
            trace->push(event);
        }

        // that the cache is full is nothing unusual, and the caller is told; what else is wrong is only said here
        if (get_whole_reason()) {
            LLAMA_LOG_ERROR("%s: %s\n", __func__, misfit.c_str());
        } else {
            LLAMA_LOG_WARN("%s: %s\n", __func__, misfit.c_str());
        }
    }

    return {};
}
