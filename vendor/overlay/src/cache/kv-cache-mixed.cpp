#include "cache/kv-cache-mixed.h"

#include "cache/context.h"
#include "llama-context.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>

//
// llama_kv_cache_mixed
//

void llama_kv_cache_mixed::set_cell(
                        llama_kv_cells & cells,
                              uint32_t   i,
                             llama_pos   pos,
                             llama_pos   shift,
               const llama_kv_cell_ext & ext,
       const llama_kv_cells::seq_set_t & seqs) {
    // the position that the token had before; after pos_div(), which counts forwards, that may come out negative
    if (pos >= shift) {
        cells.pos_set(i, pos - shift);
    } else {
        cells.pos_set(i, shift - pos);
        cells.pos_div(i, shift - pos + 1); // to 0
        shift = pos;
    }
    if (shift != 0) {
        cells.pos_add(i, shift);
    }

    cells.ext_set(i, ext);

    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        if (seqs.test(s)) {
            cells.seq_add(i, s);
        }
    }
}

llama_kv_cache * llama_kv_cache_mixed::get_hot() const {
    return kv_hot;
}

llama_kv_cache * llama_kv_cache_mixed::get_cold() const {
    return kv_cold.get();
}

bool llama_kv_cache_mixed::has_cold() const {
    return params.n_cold > 0;
}

ggml_tensor * llama_kv_cache_mixed::get_v_storage(const llama_kv_cache & kv, int32_t il) {
    return kv.layers[kv.map_layer_ids.at(il)].v;
}

const llama_kv_mixed_params & llama_kv_cache_mixed::get_params() const {
    return params;
}

uint32_t llama_kv_cache_mixed::get_n_ctx_seq() const {
    return n_ctx_seq;
}

const llama_kv_mixed_means * llama_kv_cache_mixed::get_means() const {
    return means.get();
}

ggml_tensor * llama_kv_cache_mixed::get_k_mean(int32_t il) const {
    return means ? means->get(kv_cold->map_layer_ids.at(il)) : nullptr;
}

int64_t llama_kv_cache_mixed::get_n_rot_k() const {
    return n_rot_k;
}

int64_t llama_kv_cache_mixed::get_n_rot_v() const {
    return n_rot_v;
}

std::pair<uint32_t, uint32_t> llama_kv_cache_mixed::get_seq_use(llama_seq_id seq_id) const {
    const uint32_t strm = kv_hot->get_stream(seq_id);

    return { kv_hot->v_cells[strm].seq_pos_get(seq_id).size(), kv_cold->v_cells[strm].seq_pos_get(seq_id).size() };
}

llama_kv_mixed_stats llama_kv_cache_mixed::get_stats() const {
    llama_kv_mixed_stats res = {};

    res.struct_size = sizeof(res);

    res.n_stream = kv_hot->get_n_stream();
    res.n_layer  = kv_hot->layers.size();

    for (uint32_t s = 0; s < res.n_stream; ++s) {
        res.hot_size  += kv_hot ->v_cells[s].size();
        res.hot_used  += kv_hot ->v_cells[s].get_used();
        res.cold_size += kv_cold->v_cells[s].size();
        res.cold_used += kv_cold->v_cells[s].get_used();
    }

    res.type_hot_k  = kv_hot ->type_k();
    res.type_hot_v  = kv_hot ->type_v();
    res.type_cold_k = params.type_cold_k;
    res.type_cold_v = params.type_cold_v;

    res.bytes_hot   = kv_hot ->total_size();
    res.bytes_cold  = kv_cold->total_size();
    if (means) {
        for (const auto & [buft, size] : means->memory_breakdown()) {
            res.bytes_cold += size;
        }
    }
    res.bytes_plain = bytes_plain;

    res.n_migrations   = n_migrations;
    res.n_tokens_moved = n_tokens_moved;
    res.n_refused      = n_refused;
    res.t_migrate_us   = t_migrate_us;

    return res;
}

//
// trace
//

llama_kv_mixed_trace & llama_kv_cache_mixed::get_trace() const {
    return *trace;
}

void llama_kv_cache_mixed::trace_start(uint32_t n_max, uint32_t flags) {
    trace->start(n_max, flags);

    if (n_max > 0) {
        trace->push(make_event(LLAMA_KV_MIXED_EVENT_INIT, -1));
    }
}

llama_kv_mixed_event llama_kv_cache_mixed::make_event(
        llama_kv_mixed_event_kind kind, int32_t strm, llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    llama_kv_mixed_event res = {};

    res.kind    = kind;
    res.trigger = -1;
    res.strm    = strm;
    res.pos_min = p0;
    res.pos_max = p1;

    for (uint32_t s = 0; s < kv_hot->get_n_stream(); ++s) {
        if (strm == -1 || s == (uint32_t) strm) {
            res.hot_used  += kv_hot ->v_cells[s].get_used();
            res.hot_size  += kv_hot ->v_cells[s].size();
            res.cold_used += kv_cold->v_cells[s].get_used();
            res.cold_size += kv_cold->v_cells[s].size();
        }
    }

    if (seq_id >= 0) {
        res.seqs[seq_id/64] |= 1ull << (seq_id % 64);
    }

    res.rmse_k = res.max_k = res.rmse_v = res.max_v = res.rms_k = res.rms_v = NAN;

    return res;
}

//
// llama_memory_i
//

llama_memory_context_ptr llama_kv_cache_mixed::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);

    balloc.split_reset();

    std::vector<llama_ubatch> ubatches;
    while (true) {
        auto ubatch = n_stream == 1 ? split_simple(balloc, ubatches, n_ubatch) : split_equal(balloc, ubatches, n_ubatch, true);

        if (ubatch.n_tokens == 0) {
            break;
        }

        ubatches.push_back(std::move(ubatch)); // NOLINT
    }

    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        // failed to find a suitable split
        return std::make_unique<llama_kv_cache_mixed_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }

    auto sinfos = prepare(ubatches);
    if (sinfos.empty()) {
        return std::make_unique<llama_kv_cache_mixed_context>(
            is_shift_pending() ? LLAMA_MEMORY_STATUS_FAILED_COMPUTE : LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }

    return std::make_unique<llama_kv_cache_mixed_context>(this, std::move(sinfos), std::move(ubatches));
}

llama_memory_context_ptr llama_kv_cache_mixed::init_full() {
    return std::make_unique<llama_kv_cache_mixed_context>(this);
}

llama_memory_context_ptr llama_kv_cache_mixed::init_update(llama_context * lctx, bool optimize) {
    GGML_UNUSED(optimize);

    this->lctx = lctx;

    is_refused = false;

    const bool do_shift = kv_hot->get_has_shift() || kv_cold->get_has_shift();

    return std::make_unique<llama_kv_cache_mixed_context>(this, lctx, do_shift);
}

llama_memory_context_ptr llama_kv_cache_mixed::init_update(llama_context * lctx, llama_kv_cache & kv) {
    kv_rest = &kv;

    return std::make_unique<llama_kv_cache_rest_context>(this, &kv, lctx, kv.get_has_shift(), std::move(kv.sc_info));
}

bool llama_kv_cache_mixed::get_can_shift() const {
    return llama_kv_cache::get_can_shift() && kv_cold->get_can_shift();
}

void llama_kv_cache_mixed::clear(bool data) {
    llama_kv_cache::clear(data);
    kv_cold->clear(data);

    shift_jobs.clear();

    if (trace->is_on()) {
        trace->push(make_event(LLAMA_KV_MIXED_EVENT_CLEAR, -1));
    }
}

bool llama_kv_cache_mixed::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    bool res = true;

    res = llama_kv_cache::seq_rm(seq_id, p0, p1) && res;
    res = kv_cold->seq_rm(seq_id, p0, p1) && res;

    if (trace->is_on()) {
        trace->push(make_event(LLAMA_KV_MIXED_EVENT_SEQ_RM, -1, seq_id, p0, p1));
    }

    return res;
}

void llama_kv_cache_mixed::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    llama_kv_cache::seq_cp(seq_id_src, seq_id_dst, p0, p1);
    kv_cold->seq_cp(seq_id_src, seq_id_dst, p0, p1);

    // Rows go to another stream at once. Upstream leaves that to the next update, which then takes and overwrites what is
    // in the two streams by that time: after a clear(), a state_read() or a migration that is something else.
    for (llama_kv_cache * kv : { kv_hot, kv_cold.get() }) {
        const auto sc_info = std::move(kv->sc_info);
        kv->sc_info = {};

        if (!sc_info.empty()) {
            synchronize();
        }

        for (size_t i = 0; i < sc_info.ssrc.size(); ++i) {
            for (const auto & layer : kv->layers) {
                ggml_backend_tensor_copy(layer.k_stream[sc_info.ssrc[i]], layer.k_stream[sc_info.sdst[i]]);
                ggml_backend_tensor_copy(layer.v_stream[sc_info.ssrc[i]], layer.v_stream[sc_info.sdst[i]]);
            }

            if (means && kv == kv_cold.get()) {
                means->copy_stream(sc_info.ssrc[i], sc_info.sdst[i]);
            }

            copy_shift_jobs(*kv, sc_info.ssrc[i], sc_info.sdst[i]);
        }
    }

    if (trace->is_on()) {
        auto event = make_event(LLAMA_KV_MIXED_EVENT_SEQ_CP, -1, seq_id_src, p0, p1);
        event.seqs[seq_id_dst/64] |= 1ull << (seq_id_dst % 64);
        trace->push(event);
    }
}

void llama_kv_cache_mixed::seq_keep(llama_seq_id seq_id) {
    llama_kv_cache::seq_keep(seq_id);
    kv_cold->seq_keep(seq_id);

    if (trace->is_on()) {
        trace->push(make_event(LLAMA_KV_MIXED_EVENT_SEQ_KEEP, -1, seq_id));
    }
}

void llama_kv_cache_mixed::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    llama_kv_cache::seq_add(seq_id, p0, p1, shift);
    kv_cold->seq_add(seq_id, p0, p1, shift);

    if (trace->is_on()) {
        trace->push(make_event(LLAMA_KV_MIXED_EVENT_SEQ_ADD, -1, seq_id, p0, p1));
    }
}

void llama_kv_cache_mixed::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    llama_kv_cache::seq_div(seq_id, p0, p1, d);
    kv_cold->seq_div(seq_id, p0, p1, d);

    if (trace->is_on()) {
        trace->push(make_event(LLAMA_KV_MIXED_EVENT_SEQ_DIV, -1, seq_id, p0, p1));
    }
}

llama_pos llama_kv_cache_mixed::seq_pos_min(llama_seq_id seq_id) const {
    const llama_pos hot  = llama_kv_cache::seq_pos_min(seq_id);
    const llama_pos cold = kv_cold->seq_pos_min(seq_id);

    // -1: the sequence has no token there
    return hot < 0 ? cold : cold < 0 ? hot : std::min(hot, cold);
}

llama_pos llama_kv_cache_mixed::seq_pos_max(llama_seq_id seq_id) const {
    return std::max(llama_kv_cache::seq_pos_max(seq_id), kv_cold->seq_pos_max(seq_id));
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_cache_mixed::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res = llama_kv_cache::memory_breakdown();

    for (const auto & [buft, size] : kv_cold->memory_breakdown()) {
        res[buft] += size;
    }

    if (means) {
        for (const auto & [buft, size] : means->memory_breakdown()) {
            res[buft] += size;
        }
    }

    return res;
}

//
// where a mixed cache is found
//

llama_kv_cache_mixed * llama_kv_mixed_find(llama_memory_i * mem) {
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(mem)) {
        mem = hybrid->get_mem_attn();
    } else if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(mem)) {
        mem = iswa->get_base();
    }

    return dynamic_cast<llama_kv_cache_mixed *>(mem);
}
