#include "cache/policy.h"

#include <algorithm>
#include <map>
#include <tuple>

uint32_t llama_kv_mixed_policy::n_move_max() const {
    return std::max(1u, std::min(n_hot/4, n_group));
}

bool llama_kv_mixed_policy::is_over(uint32_t n_used) const {
    return (double) n_used > (double) threshold*n_hot;
}

uint32_t llama_kv_mixed_policy::n_pin_max() const {
    return std::min(n_hot - 1, std::max(n_hot/2, n_sink));
}

std::vector<llama_kv_mixed_cand> llama_kv_mixed_policy::without_pinned(std::vector<llama_kv_mixed_cand> cands) const {
    const auto others = std::stable_partition(cands.begin(), cands.end(), [this](const auto & cand) {
        return is_sink(cand.pos);
    });

    std::sort(cands.begin(), others, [](const auto & a, const auto & b) {
        return std::tie(a.pos, a.seqs, a.cell) < std::tie(b.pos, b.seqs, b.cell);
    });

    std::map<int32_t, uint32_t> n_pinned; // by sequence
    uint32_t n_pinned_all = 0;

    const auto pinned = std::remove_if(cands.begin(), others, [&](const auto & cand) {
        const bool res = n_pinned_all < n_pin_max() && n_pinned[cand.seqs.front()] < n_sink;

        n_pinned[cand.seqs.front()] += res;
        n_pinned_all                += res;

        return res;
    });

    cands.erase(pinned, others);

    return cands;
}

// true when no sequence keeps a candidate older than one of its first n
static bool is_oldest_first(const std::vector<llama_kv_mixed_cand> & cands, uint32_t n) {
    std::map<int32_t, int32_t> pos_moved; // sequence -> newest position among the first n

    for (uint32_t i = 0; i < n; ++i) {
        for (const int32_t s : cands[i].seqs) {
            const auto it = pos_moved.emplace(s, cands[i].pos).first;
            it->second = std::max(it->second, cands[i].pos);
        }
    }

    for (uint32_t i = n; i < cands.size(); ++i) {
        for (const int32_t s : cands[i].seqs) {
            const auto it = pos_moved.find(s);
            if (it != pos_moved.end() && cands[i].pos < it->second) {
                return false;
            }
        }
    }

    return true;
}

std::vector<uint32_t> llama_kv_mixed_policy::select(std::vector<llama_kv_mixed_cand> cands, uint32_t n) {
    n = std::min<uint32_t>(n, cands.size());

    std::sort(cands.begin(), cands.end(), [](const auto & a, const auto & b) {
        return std::tie(b.age, a.pos, a.seqs, a.cell) < std::tie(a.age, b.pos, b.seqs, b.cell);
    });

    // sequences that share later tokens but not the earlier ones can put ages out of order, positions never are
    if (!is_oldest_first(cands, n)) {
        std::sort(cands.begin(), cands.end(), [](const auto & a, const auto & b) {
            return std::tie(a.pos, a.seqs, a.cell) < std::tie(b.pos, b.seqs, b.cell);
        });
    }

    std::vector<uint32_t> res(n);
    for (uint32_t i = 0; i < n; ++i) {
        res[i] = cands[i].cell;
    }

    return res;
}

uint32_t llama_kv_mixed_plan::n_pinned(const llama_kv_mixed_policy & policy) const {
    uint32_t n = 0;

    for (const auto & [seq, n_seq] : n_sinks) {
        n += std::min(n_seq, policy.n_sink);
    }

    return std::min(n, policy.n_pin_max());
}

uint32_t llama_kv_mixed_plan::room(const llama_kv_mixed_policy & policy) const {
    return policy.n_hot - hot_used + std::min(hot_used - n_pinned(policy), cold_size - cold_used);
}

void llama_kv_mixed_plan::migrate(const llama_kv_mixed_policy & policy, uint32_t n_movable) {
    const uint32_t n = std::min({ policy.n_move_max(), n_movable, cold_size - cold_used });

    hot_used  -= n;
    cold_used += n;
}

bool llama_kv_mixed_plan::make_room(const llama_kv_mixed_policy & policy, uint32_t n) {
    if (n > room(policy)) {
        return false;
    }

    while (policy.n_hot - hot_used < n) {
        migrate(policy, hot_used - n_pinned(policy));
    }

    return true;
}

bool llama_kv_mixed_plan::place(const llama_kv_mixed_policy & policy, const llama_kv_mixed_share & share) {
    if (!make_room(policy, share.n)) {
        return false;
    }

    // the new tokens' rows are yet to be computed: they stay
    const uint32_t n_movable = hot_used - n_pinned(policy);

    hot_used += share.n;

    for (const int32_t seq : share.sinks) {
        n_sinks[seq]++;
    }

    if (policy.is_over(hot_used)) {
        migrate(policy, n_movable);
    }

    return true;
}
