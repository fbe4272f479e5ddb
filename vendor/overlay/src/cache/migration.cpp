// how tokens get into hot, and from hot to cold

#include "cache/kv-cache-mixed.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <thread>

// the lowest sequence of a cell, -1: it has none but the one left out
static llama_seq_id lowest_seq(const llama_kv_cells & cells, uint32_t i, llama_seq_id without) {
    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        if (s != without && cells.seq_has(i, s)) {
            return s;
        }
    }

    return -1;
}

llama_kv_mixed_plan llama_kv_cache_mixed::get_plan(uint32_t strm, llama_seq_id without) const {
    const auto & hot  = kv_hot ->v_cells[strm];
    const auto & cold = kv_cold->v_cells[strm];

    llama_kv_mixed_plan res = { hot.get_used(), cold.get_used(), cold.size(), {} };

    for (uint32_t i = 0; i < hot.size(); ++i) {
        if (!hot.is_empty(i) && policy.is_sink(hot.pos_get(i))) {
            const llama_seq_id s = lowest_seq(hot, i, without);
            if (s != -1) {
                res.n_sinks[s]++;
            }
        }
    }

    if (without != -1) {
        for (const auto & [pos, i] : hot.seq_pos_get(without)) {
            res.hot_used -= hot.seq_count(i) == 1;
        }
        for (const auto & [pos, i] : cold.seq_pos_get(without)) {
            res.cold_used -= cold.seq_count(i) == 1;
        }
    }

    return res;
}

std::vector<llama_kv_mixed_plan> llama_kv_cache_mixed::get_plans() const {
    std::vector<llama_kv_mixed_plan> res;

    for (uint32_t s = 0; s < n_stream; ++s) {
        res.push_back(get_plan(s));
    }

    return res;
}

uint32_t llama_kv_cache_mixed::get_n_cold(const slot_info & sinfo) const {
    uint32_t n_used = 0;

    for (const uint32_t s : sinfo.strm) {
        n_used = std::max(n_used, kv_cold->v_cells[s].used_max_p1());
    }

    // padded as llama_kv_cache::get_n_kv() does, so that the graph can be reused
    return n_used == 0 ? 0 : std::min(params.n_cold, (uint32_t) GGML_PAD(n_used, 256));
}

std::vector<uint32_t> llama_kv_cache_mixed::get_free_cold(uint32_t strm, uint32_t n) const {
    const auto & cells = kv_cold->v_cells[strm];

    std::vector<uint32_t> res;

    for (uint32_t i = 0; i < cells.size() && res.size() < n; ++i) {
        if (cells.is_empty(i)) {
            res.push_back(i);
        }
    }

    return res;
}

bool llama_kv_cache_mixed::make_room(uint32_t strm, uint32_t n) {
    const auto & cells = kv_hot->v_cells[strm];

    while (cells.size() - cells.get_used() < n) {
        if (move_tokens_to_cold_cache(strm, policy.n_move_max(), LLAMA_KV_MIXED_TRIGGER_ROOM) == 0) {
            return false;
        }
    }

    return true;
}

llama_kv_cache_mixed::slot_info llama_kv_cache_mixed::find_slot(const llama_ubatch & ubatch) {
    if (!finish_shift()) {
        return {};
    }

    const auto shares = get_shares(ubatch);

    for (const auto & sh : shares) {
        if (sh.n > get_plan(sh.strm).room(policy)) {
            n_refused++;
            if (trace->is_on()) {
                auto event = make_event(LLAMA_KV_MIXED_EVENT_REFUSE, sh.strm);
                event.n_tokens = sh.n;
                trace->push(event);
            }
            return {};
        }
    }

    for (const auto & sh : shares) {
        if (!make_room(sh.strm, sh.n)) {
            return {};
        }
    }

    return kv_hot->find_slot(ubatch, false);
}

void llama_kv_cache_mixed::commit(const slot_info & sinfo) {
    for (size_t s = 0; s < sinfo.n_stream(); ++s) {
        if (policy.is_over(kv_hot->v_cells[sinfo.strm[s]].get_used())) {
            move_tokens_to_cold_cache(sinfo.strm[s], policy.n_move_max(), LLAMA_KV_MIXED_TRIGGER_THRESHOLD, sinfo.idxs[s]);
        }
    }
}

void llama_kv_cache_mixed::drop(const slot_info & sinfo, const llama_ubatch & ubatch) {
    uint32_t i_token = 0;

    for (size_t s = 0; s < sinfo.n_stream(); ++s) {
        auto & cells = kv_hot->v_cells[sinfo.strm[s]];

        for (const uint32_t i : sinfo.idxs[s]) {
            if (!cells.is_empty(i) && cells.pos_get(i) == ubatch.pos[i_token]) {
                cells.rm(i);
            }
            i_token++;
        }
    }
}

//
// a migration
//

llama_kv_cache_mixed::migration llama_kv_cache_mixed::pick(uint32_t strm, uint32_t n, const std::vector<uint32_t> & in_flight) const {
    const auto & hot = kv_hot->v_cells[strm];

    migration res;

    res.strm = strm;
    res.dst  = get_free_cold(strm, std::min(n, policy.n_move_max()));

    if (res.dst.empty()) {
        return res;
    }

    // the oldest cells that are neither pinned nor in flight
    std::vector<llama_kv_mixed_cand> cands(hot.size());

    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        const auto & seq = hot.seq_pos_get(s);

        for (const auto & [pos, i] : seq) {
            auto & cand = cands[i];

            cand.cell = i;
            cand.pos  = pos;
            cand.age  = std::max(cand.age, seq.rbegin()->first - pos);
            cand.seqs.push_back(s);
        }
    }

    for (const uint32_t i : in_flight) {
        cands[i].seqs.clear();
    }

    cands.erase(std::remove_if(cands.begin(), cands.end(), [&](const auto & cand) {
        return cand.seqs.empty();
    }), cands.end());

    res.src = llama_kv_mixed_policy::select(policy.without_pinned(std::move(cands)), res.dst.size());

    res.dst.resize(res.src.size());

    return res;
}

int llama_kv_cache_mixed::get_n_threads() const {
    return lctx ? lctx->n_threads() : std::clamp<int>(std::thread::hardware_concurrency(), 1, GGML_DEFAULT_N_THREADS);
}

llama_kv_mixed_moves llama_kv_cache_mixed::get_moves(const std::vector<uint32_t> & src, uint32_t strm, const std::vector<uint32_t> & dst) const {
    const auto & cells = kv_cold->v_cells[strm];

    llama_kv_mixed_moves res;

    res.src.assign(src.begin(), src.end());

    for (const uint32_t i : dst) {
        res.dst.push_back((int64_t) strm*cells.size() + i);
    }

    if (!means) {
        return res;
    }

    const uint32_t page0 = strm*means->get_n_page();

    for (const uint32_t i : dst) {
        res.page.push_back(page0 + llama_kv_mixed_means::page_of(i));
    }
    for (const uint32_t page : llama_kv_mixed_means::get_pages(dst)) {
        if (is_page_empty(strm, page)) {
            res.page_new.push_back(page0 + page);
        }
    }

    return res;
}

bool llama_kv_cache_mixed::is_page_empty(uint32_t strm, uint32_t page) const {
    const auto & cells = kv_cold->v_cells[strm];

    const uint32_t end = std::min((page + 1)*LLAMA_KV_MIXED_PAGE, (uint32_t) cells.size());

    for (uint32_t i = page*LLAMA_KV_MIXED_PAGE; i < end; ++i) {
        if (!cells.is_empty(i)) {
            return false;
        }
    }

    return true;
}

void llama_kv_cache_mixed::synchronize() const {
    if (lctx) {
        ggml_backend_sched_synchronize(lctx->get_sched());
    }
}

bool llama_kv_cache_mixed::copy(const migration & mig) {
    auto src = mig.src;

    for (uint32_t & i : src) {
        i += mig.strm*kv_hot->get_size();
    }

    if (!mover->move(get_moves(src, mig.strm, mig.dst), get_n_threads(), lctx ? lctx->get_sched() : nullptr)) {
        LLAMA_LOG_ERROR("%s: failed to copy %zu tokens from hot to cold, they stay hot\n", __func__, mig.src.size());
        return false;
    }

    return true;
}

void llama_kv_cache_mixed::commit(const migration & mig) {
    auto & hot  = kv_hot ->v_cells[mig.strm];
    auto & cold = kv_cold->v_cells[mig.strm];

    for (size_t i = 0; i < mig.src.size(); ++i) {
        const uint32_t src = mig.src[i];

        set_cell(cold, mig.dst[i], hot.pos_get(src), hot.get_shift(src), hot.ext_get(src), hot.seq_get_all(src));

        hot.rm(src);
    }
}

llama_kv_mixed_event llama_kv_cache_mixed::make_event(const migration & mig, llama_kv_mixed_trigger trigger) const {
    const auto & hot = kv_hot->v_cells[mig.strm];

    auto res = make_event(LLAMA_KV_MIXED_EVENT_TRIGGER, mig.strm);

    res.trigger  = trigger;
    res.n_tokens = mig.src.size();
    res.pos_min  = INT32_MAX;

    for (const uint32_t i : mig.src) {
        res.pos_min = std::min(res.pos_min, hot.pos_get(i));
        res.pos_max = std::max(res.pos_max, hot.pos_get(i));

        const auto & seqs = hot.seq_get_all(i);
        for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
            res.seqs[s/64] |= (uint64_t) seqs.test(s) << (s % 64);
        }
    }

    return res;
}

void llama_kv_cache_mixed::record(const migration & mig, llama_kv_mixed_event event, int64_t dur_us) {
    event.kind   = LLAMA_KV_MIXED_EVENT_MIGRATE;
    event.dur_us = dur_us;

    event.hot_used  = kv_hot ->v_cells[mig.strm].get_used();
    event.cold_used = kv_cold->v_cells[mig.strm].get_used();

    for (size_t i = 0; i < kv_hot->layers.size(); ++i) {
        const auto & l_hot  = kv_hot ->layers[i];
        const auto & l_cold = kv_cold->layers[i];

        event.bytes_in  += mig.src.size()*(l_hot .k->nb[1] + l_hot .v->nb[1]);
        event.bytes_out += mig.src.size()*(l_cold.k->nb[1] + l_cold.v->nb[1]);
    }

    // the rows that left hot are still there, until new tokens take their cells
    std::vector<llama_kv_mixed_layer_error> errors;
    if (trace->has(LLAMA_KV_MIXED_TRACE_ERROR)) {
        measure_error(mig, event, errors);
    }

    trace->push(event, errors);
}

uint32_t llama_kv_cache_mixed::move_tokens_to_cold_cache(
                           uint32_t   strm,
                           uint32_t   n,
             llama_kv_mixed_trigger   trigger,
        const std::vector<uint32_t> & in_flight) {
    if (!finish_shift()) {
        return 0;
    }

    const int64_t t_start_us = ggml_time_us();

    const migration mig = pick(strm, n, in_flight);

    if (mig.src.empty()) {
        return 0;
    }

    llama_kv_mixed_event event = {};

    if (trace->is_on()) {
        event = make_event(mig, trigger);
        trace->push(event);
    }

    if (!copy(mig)) {
        if (trace->is_on()) {
            event.kind = LLAMA_KV_MIXED_EVENT_FAIL;
            trace->push(event);
        }
        return 0;
    }

    commit(mig);

    // (a trace has the time it took, and reads the rows)
    if (trace->is_on()) {
        synchronize();
    }

    const int64_t dur_us = ggml_time_us() - t_start_us;

    n_migrations   += 1;
    n_tokens_moved += mig.src.size();
    t_migrate_us   += dur_us;

    if (trace->is_on()) {
        record(mig, event, dur_us);
    }

    return mig.src.size();
}

void llama_kv_cache_mixed::fail_moves(uint32_t n) {
    if (mover) {
        mover->fail(n);
    }
}

std::string llama_kv_cache_mixed::describe_use() const {
    const auto stats = get_stats();

    return format("hot=%u/%u, cold=%u/%u cells used", stats.hot_used, stats.hot_size, stats.cold_used, stats.cold_size);
}
