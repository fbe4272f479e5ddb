#include "cache/kv-cache-mixed.h"

#include "cache/context.h"
#include "cache/huge-pages.h"
#include "cache/params.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

//
// llama_kv_cache_mixed
//

// the cells of the two caches, after what the context asks for has been taken into account
static llama_kv_mixed_params resolve_params(llama_kv_mixed_params params, uint32_t n_ctx_seq, uint32_t n_pad) {
    llama_kv_mixed_validate(params);

    // more hot cells than the context has tokens would never be used
    params.n_hot = std::min(params.n_hot, n_ctx_seq);

    // none where all fits in hot: there is nothing to quantise
    if (params.n_cold == 0) {
        params.n_cold = (n_ctx_seq - params.n_hot + n_pad - 1)/n_pad*n_pad;
    }

    if (params.n_hot % n_pad != 0) {
        throw std::runtime_error(format("hot=%u is not a multiple of n_pad=%u", params.n_hot, n_pad));
    }
    if (params.n_cold % n_pad != 0) {
        throw std::runtime_error(format("cold_size=%u is not a multiple of n_pad=%u", params.n_cold, n_pad));
    }

    if ((uint64_t) params.n_hot + params.n_cold < n_ctx_seq) {
        throw std::runtime_error(format("hot=%u and cold_size=%u hold fewer tokens than the context of %u",
            params.n_hot, params.n_cold, n_ctx_seq));
    }

    return params;
}

static std::string type_label(ggml_type type) {
    std::string res = type == GGML_TYPE_F16 ? "fp16" : ggml_type_name(type);
    std::transform(res.begin(), res.end(), res.begin(), [](unsigned char c) { return std::toupper(c); });
    return res;
}

static std::string type_label(ggml_type type_k, ggml_type type_v) {
    return type_k == type_v ? type_label(type_k) : type_label(type_k) + "/" + type_label(type_v);
}

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

llama_kv_cache_mixed::setup llama_kv_cache_mixed::make_setup(
            const llama_hparams & hparams,
                      ggml_type   type_k,
                      ggml_type   type_v,
    const llama_kv_mixed_params & params_req,
                       uint32_t   n_ctx_seq,
                       uint32_t   n_pad,
          const layer_filter_cb & filter) {
    const auto params = llama_kv_mixed_with_auto(resolve_params(params_req, n_ctx_seq, n_pad), GGML_TYPE_IQ4_NL);

    for (const ggml_type type : { type_k, type_v }) {
        if (type != GGML_TYPE_F16 && type != GGML_TYPE_BF16 && type != GGML_TYPE_F32) {
            throw std::runtime_error(format("the hot type must be f16, bf16 or f32, not %s: "
                "the types of the context are those of hot, cold=%s is how older tokens are stored",
                ggml_type_name(type), ggml_type_name(type)));
        }
    }

    bool any = false;

    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (!hparams.has_kv(il) || (filter && !filter(il))) {
            continue;
        }

        any = true;

        const struct { const char * name; ggml_type type; uint32_t n_embd_head; } sides[] = {
            { "cold_k", (ggml_type) params.type_cold_k, hparams.n_embd_head_k(il) },
            { "cold_v", (ggml_type) params.type_cold_v, hparams.n_embd_head_v(il) },
        };

        for (const auto & side : sides) {
            if (side.n_embd_head % ggml_blck_size(side.type) != 0) {
                throw std::runtime_error(format("%s=%s stores blocks of %d values, and the head size %u of layer %u is not a multiple of that",
                    side.name, ggml_type_name(side.type), (int) ggml_blck_size(side.type), side.n_embd_head, il));
            }
        }
    }

    if (!any) {
        throw std::runtime_error("no layer of this model attends to the whole context, there is nothing to mix");
    }

    LLAMA_LOG_INFO("%s: creating hot KV cache (%s), size = %u cells\n", "llama_kv_cache_mixed", type_label(type_k, type_v).c_str(), params.n_hot);

    return { params };
}

llama_kv_cache_mixed::llama_kv_cache_mixed(
              const llama_model & model,
            const llama_hparams & hparams,
                      ggml_type   type_k,
                      ggml_type   type_v,
    const llama_kv_mixed_params & params,
                           bool   offload,
                           bool   unified,
                       uint32_t   n_ctx_seq,
                       uint32_t   n_seq_max,
                       uint32_t   n_pad,
          const layer_filter_cb & filter,
           const layer_reuse_cb & reuse,
                     bool   rotate) :
    llama_kv_cache_mixed(
            model, hparams, type_k, type_v,
            make_setup(hparams, type_k, type_v, params, n_ctx_seq, n_pad, filter),
            offload, unified, n_ctx_seq, n_seq_max, n_pad, filter, reuse, rotate) {
}

// note: rows of V are never transposed, quantised ones can not be
llama_kv_cache_mixed::llama_kv_cache_mixed(
              const llama_model & model,
            const llama_hparams & hparams,
                      ggml_type   type_k,
                      ggml_type   type_v,
                    const setup & su,
                           bool   offload,
                           bool   unified,
                       uint32_t   n_ctx_seq,
                       uint32_t   n_seq_max,
                       uint32_t   n_pad,
          const layer_filter_cb & filter,
           const layer_reuse_cb & reuse,
                     bool   rotate) :
    llama_kv_cache(
            model, hparams, type_k, type_v, /*v_trans*/ false, offload, unified, su.params.n_hot, n_seq_max, n_pad,
            0, LLAMA_SWA_TYPE_NONE, nullptr, filter, reuse, nullptr, "hot_"),
    params(su.params),
    policy({ params.n_hot, params.n_group, params.n_sink, params.threshold }),
    n_ctx_seq(n_ctx_seq) {

    const ggml_type type_cold_k = (ggml_type) params.type_cold_k;
    const ggml_type type_cold_v = (ggml_type) params.type_cold_v;

    if (has_cold()) {
        LLAMA_LOG_INFO("%s: creating cold KV cache (%s), size = %u cells\n", __func__,
                ggml_is_quantized(type_cold_k) ? "quantized" : type_label(type_cold_k, type_cold_v).c_str(), params.n_cold);
    } else {
        LLAMA_LOG_INFO("%s: no cold KV cache: the %u tokens of the context fit in hot\n", __func__, n_ctx_seq);
    }

    // (memory of no size can not be allocated: without cells there are no layers either)
    const layer_filter_cb filter_none = [](int32_t) { return false; };

    kv_cold = std::make_unique<llama_kv_cache>(
            model, hparams, type_cold_k, type_cold_v, /*v_trans*/ false, offload, unified, params.n_cold, n_seq_max, n_pad,
            0, LLAMA_SWA_TYPE_NONE, nullptr, has_cold() ? filter : filter_none, reuse, nullptr, "cold_");

    for (const auto & [ctx, buf] : kv_cold->ctxs_bufs) {
        llama_kv_mixed_use_huge_pages(buf.get());
    }

    if (!rotate) {
        kv_cold->attn_rot_k = false;
        kv_cold->attn_rot_v = false;
    }

    // the matrices that upstream's graphs would get
    {
        ggml_context_ptr ctx(ggml_init({ /*.mem_size =*/ 2*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true }));

        const ggml_tensor * rot_k = kv_cold->build_input_k_rot(ctx.get());
        const ggml_tensor * rot_v = kv_cold->build_input_v_rot(ctx.get());

        n_rot_k = rot_k ? rot_k->ne[0] : 0;
        n_rot_v = rot_v ? rot_v->ne[0] : 0;
    }

    const auto get_rot = [this](int64_t n_rot) {
        return n_rot > 0 ? kv_cold->attn_rot_hadamard.at(n_rot).data() : nullptr;
    };

    for (const auto & hot : kv_hot->layers) {
        for (const ggml_tensor * t : { hot.k, hot.v }) {
            bytes_plain += (uint64_t) ggml_row_size(t->type, t->ne[0])*n_ctx_seq*t->ne[2];
        }
    }

    if (has_cold() && params.mean && ggml_is_quantized(type_cold_k)) {
        std::vector<ggml_tensor *> k;
        for (const auto & layer : kv_cold->layers) {
            k.push_back(layer.k);
        }
        means = std::make_unique<llama_kv_mixed_means>(*kv_cold, k, hparams.no_alloc);
    }

    for (size_t i = 0; i < kv_cold->layers.size(); ++i) {
        const auto & hot  = kv_hot ->layers[i];
        const auto & cold = kv_cold->layers[i];

        pairs.push_back({ hot.k, cold.k, n_rot_k, get_rot(n_rot_k), means ? means->get(i) : nullptr });
        pairs.push_back({ hot.v, cold.v, n_rot_v, get_rot(n_rot_v), nullptr });
    }

    // without allocated tensors there is nothing to move (the model is only being measured)
    if (has_cold() && !hparams.no_alloc) {
        mover = std::make_unique<llama_kv_mixed_mover>(pairs, policy.n_move_max());
    }

    trace = std::make_unique<llama_kv_mixed_trace>(type_label(type_k, type_v), type_label(type_cold_k, type_cold_v));
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
