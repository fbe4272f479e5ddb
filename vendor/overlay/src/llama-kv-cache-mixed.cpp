#include "llama-kv-cache-mixed.h"

#include "llama-kv-mixed-graph.h"

#include "llama-kv-mixed-params.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>

//
// llama_kv_cache_mixed
//

// the cells of the two caches, after what the context asks for has been taken into account
static llama_kv_mixed_params resolve_params(llama_kv_mixed_params params, uint32_t n_ctx_seq, uint32_t n_seq_stream, uint32_t n_pad) {
    llama_kv_mixed_validate(params);

    // more hot cells than the context has tokens would never be used
    params.n_hot = std::min(params.n_hot, n_ctx_seq);

    if ((uint64_t) params.n_sink*n_seq_stream >= params.n_hot) {
        throw std::runtime_error(format("sink=%u for each of %u sequences leaves no room in hot=%u",
            params.n_sink, n_seq_stream, params.n_hot));
    }

    const llama_kv_mixed_policy policy = { params.n_hot, params.n_group, params.n_sink, params.threshold };

    if (params.n_cold == 0) {
        const uint32_t n_cold = std::max(n_ctx_seq - params.n_hot, policy.n_move_max());

        params.n_cold = (n_cold + n_pad - 1)/n_pad*n_pad;
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
                       uint32_t   n_seq_stream,
                       uint32_t   n_pad,
          const layer_filter_cb & filter) {
    const auto params = resolve_params(params_req, n_ctx_seq, n_seq_stream, n_pad);

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
            make_setup(hparams, type_k, type_v, params, n_ctx_seq, unified ? n_seq_max : 1, n_pad, filter),
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

    LLAMA_LOG_INFO("%s: creating cold KV cache (%s), size = %u cells\n", __func__,
            ggml_is_quantized(type_cold_k) ? "quantized" : type_label(type_cold_k, type_cold_v).c_str(), params.n_cold);

    kv_cold = std::make_unique<llama_kv_cache>(
            model, hparams, type_cold_k, type_cold_v, /*v_trans*/ false, offload, unified, params.n_cold, n_seq_max, n_pad,
            0, LLAMA_SWA_TYPE_NONE, nullptr, filter, reuse, nullptr, "cold_");

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

    std::vector<llama_kv_mixed_mover::pair> pairs;

    for (size_t i = 0; i < kv_hot->layers.size(); ++i) {
        const auto & hot  = kv_hot ->layers[i];
        const auto & cold = kv_cold->layers[i];

        pairs.push_back({ hot.k, cold.k, n_rot_k, get_rot(n_rot_k) });
        pairs.push_back({ hot.v, cold.v, n_rot_v, get_rot(n_rot_v) });

        for (const ggml_tensor * t : { hot.k, hot.v }) {
            bytes_plain += (uint64_t) ggml_row_size(t->type, t->ne[0])*n_ctx_seq*t->ne[2];
        }
    }

    // without allocated tensors there is nothing to move (the model is only being measured)
    if (!hparams.no_alloc) {
        mover = std::make_unique<llama_kv_mixed_mover>(pairs, policy.n_move_max());
    }

    trace = std::make_unique<llama_kv_mixed_trace>(type_label(type_k, type_v), type_label(type_cold_k, type_cold_v));

    // for programs that know nothing of this cache: its trace in their log
    const char * LLAMA_KV_MIXED_TRACE = getenv("LLAMA_KV_MIXED_TRACE");
    if (LLAMA_KV_MIXED_TRACE && atoi(LLAMA_KV_MIXED_TRACE) != 0) {
        trace_start(1, LLAMA_KV_MIXED_TRACE_LOG);
    }
}

llama_kv_cache * llama_kv_cache_mixed::get_hot() const {
    return kv_hot;
}

llama_kv_cache * llama_kv_cache_mixed::get_cold() const {
    return kv_cold.get();
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

int64_t llama_kv_cache_mixed::get_n_rot_k() const {
    return n_rot_k;
}

int64_t llama_kv_cache_mixed::get_n_rot_v() const {
    return n_rot_v;
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
    res.type_cold_k = kv_cold->type_k();
    res.type_cold_v = kv_cold->type_v();

    res.bytes_hot   = kv_hot ->total_size();
    res.bytes_cold  = kv_cold->total_size();
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

    res.rmse_k = res.max_k = res.rmse_v = res.max_v = NAN;

    return res;
}

// the fast Walsh-Hadamard transform in blocks of n values, orthonormal and its own inverse
static void rotate(std::vector<float> & x, size_t n) {
    for (size_t h = 1; h < n; h *= 2) {
        for (size_t i = 0; i < x.size(); ++i) {
            if ((i & h) == 0) {
                const float a = x[i]    *0.70710678f;
                const float b = x[i + h]*0.70710678f;

                x[i]     = a + b;
                x[i + h] = a - b;
            }
        }
    }
}

void llama_kv_cache_mixed::measure_error(
                                    uint32_t   strm,
               const std::vector<uint32_t> & src,
               const std::vector<uint32_t> & dst,
                    llama_kv_mixed_event & event,
        std::vector<llama_kv_mixed_layer_error> & layers) const {
    struct error {
        double   sum = 0.0;
        float    max = 0.0f;
        uint64_t n   = 0;

        void add(const error & other) {
            sum += other.sum;
            max  = std::max(max, other.max);
            n   += other.n;
        }

        float rmse() const {
            return n == 0 ? 0.0f : (float) std::sqrt(sum/n);
        }
    };

    std::vector<uint8_t> raw;

    const auto get_row = [&raw](const ggml_tensor * t, uint32_t row, std::vector<float> & out) {
        raw.resize(ggml_row_size(t->type, t->ne[0]));
        out.resize(t->ne[0]);

        ggml_backend_tensor_get(t, raw.data(), row*raw.size(), raw.size());

        if (t->type == GGML_TYPE_F32) {
            memcpy(out.data(), raw.data(), raw.size());
        } else {
            ggml_get_type_traits(t->type)->to_float(raw.data(), out.data(), out.size());
        }
    };

    std::vector<float> row_src;
    std::vector<float> row_dst;

    const auto compare = [&](const ggml_tensor * t_src, const ggml_tensor * t_dst, int64_t n_rot) {
        error res;

        for (size_t i = 0; i < src.size(); ++i) {
            get_row(t_src, src[i], row_src);
            get_row(t_dst, dst[i], row_dst);
            rotate(row_dst, n_rot);

            for (size_t j = 0; j < row_src.size(); ++j) {
                const float d = std::fabs(row_src[j] - row_dst[j]);

                res.sum += (double) d*d;
                res.max  = std::max(res.max, d);
            }

            res.n += row_src.size();
        }

        return res;
    };

    error k_all;
    error v_all;

    for (size_t i = 0; i < kv_hot->layers.size(); ++i) {
        const auto & hot  = kv_hot ->layers[i];
        const auto & cold = kv_cold->layers[i];

        const error k = compare(hot.k_stream[strm], cold.k_stream[strm], n_rot_k);
        const error v = compare(hot.v_stream[strm], cold.v_stream[strm], n_rot_v);

        k_all.add(k);
        v_all.add(v);

        layers.push_back({ 0, (int32_t) hot.il, k.rmse(), k.max, v.rmse(), v.max });
    }

    event.rmse_k = k_all.rmse();
    event.max_k  = k_all.max;
    event.rmse_v = v_all.rmse();
    event.max_v  = v_all.max;
}

//
// llama_memory_i
//

llama_memory_context_ptr llama_kv_cache_mixed::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);

    // the update before this has failed: rows and positions do not belong together
    if (kv_hot->get_has_shift() || kv_cold->get_has_shift()) {
        return std::make_unique<llama_kv_cache_mixed_context>(LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
    }

    balloc.split_reset();

    std::vector<llama_ubatch> ubatches;
    while (true) {
        const uint32_t n = get_n_ubatch(balloc, ubatches, n_ubatch, 0);

        auto ubatch = n_stream == 1 ? balloc.split_simple(n) : balloc.split_equal(n, true, 0);

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
        return std::make_unique<llama_kv_cache_mixed_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
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

bool llama_kv_cache_mixed::get_can_shift() const {
    return llama_kv_cache::get_can_shift() && kv_cold->get_can_shift();
}

void llama_kv_cache_mixed::clear(bool data) {
    llama_kv_cache::clear(data);
    kv_cold->clear(data);

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

        if (!sc_info.empty() && lctx) {
            // they may still be on their way
            ggml_backend_sched_synchronize(lctx->get_sched());
        }

        for (size_t i = 0; i < sc_info.ssrc.size(); ++i) {
            for (const auto & layer : kv->layers) {
                ggml_backend_tensor_copy(layer.k_stream[sc_info.ssrc[i]], layer.k_stream[sc_info.sdst[i]]);
                ggml_backend_tensor_copy(layer.v_stream[sc_info.ssrc[i]], layer.v_stream[sc_info.sdst[i]]);
            }
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

    return res;
}

//
// llama_kv_cache_mixed specific API
//

llama_kv_mixed_plan llama_kv_cache_mixed::get_plan(uint32_t strm) const {
    const auto & hot  = kv_hot ->v_cells[strm];
    const auto & cold = kv_cold->v_cells[strm];

    llama_kv_mixed_plan res = { hot.get_used(), 0, cold.get_used(), cold.size() };

    for (uint32_t i = 0; i < hot.size(); ++i) {
        if (!hot.is_empty(i) && policy.is_pinned(hot.pos_get(i))) {
            res.hot_pinned++;
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

uint32_t llama_kv_cache_mixed::get_n_ubatch(
              const llama_batch_allocr & balloc,
       const std::vector<llama_ubatch> & ubatches,
                              uint32_t   n_ubatch,
                              uint32_t   n_tail) const {
    // without causal attention all tokens of a batch see each other, it can not be split
    if (lctx && !lctx->get_cparams().causal_attn) {
        return n_ubatch;
    }

    // what is left of the batch in each stream
    std::vector<uint32_t> n_left(n_stream, 0);
    {
        const llama_batch & batch = balloc.get_batch();
        for (int32_t i = 0; i < batch.n_tokens; ++i) {
            n_left[get_stream(batch.seq_id[i][0])]++;
        }
    }

    auto plans = get_plans();

    for (const auto & ubatch : ubatches) {
        for (const auto & sh : get_shares(ubatch)) {
            if (!plans[sh.strm].place(policy, sh.n, sh.n_pinned)) {
                return n_ubatch;
            }

            n_left[sh.strm] -= sh.n;
        }
    }

    // a ubatch goes to hot as a whole
    uint32_t res = n_ubatch;
    for (uint32_t s = 0; s < n_stream; ++s) {
        if (n_left[s] > 0) {
            res = std::min(res, plans[s].room(policy));
        }
    }

    return res <= n_tail ? n_ubatch : res;
}

llama_kv_cache_mixed::slot_info_vec_t llama_kv_cache_mixed::prepare(const std::vector<llama_ubatch> & ubatches) {
    auto plans = get_plans();

    bool success = true;

    for (const auto & ubatch : ubatches) {
        for (const auto & sh : get_shares(ubatch)) {
            success = success && plans[sh.strm].place(policy, sh.n, sh.n_pinned);
        }
    }

    if (success) {
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

        LLAMA_LOG_WARN("%s: the batch does not fit: %s\n", __func__, describe_use().c_str());
    }

    return {};
}

void llama_kv_cache_mixed::state_clear(llama_seq_id seq_id) {
    kv_cold->state_clear(seq_id);
    llama_kv_cache::state_clear(seq_id);
}

std::vector<llama_kv_cache_mixed::share> llama_kv_cache_mixed::get_shares(const llama_ubatch & ubatch) const {
    const uint32_t n_shares = kv_hot->get_n_stream() == 1 ? 1 : ubatch.n_seqs_unq;
    const uint32_t n        = ubatch.n_tokens/n_shares;

    std::vector<share> res;

    for (uint32_t s = 0; s < n_shares; ++s) {
        share sh = { get_stream(ubatch.seq_id_unq[s]), n, 0 };

        for (uint32_t i = s*n; i < (s + 1)*n; ++i) {
            sh.n_pinned += policy.is_pinned(ubatch.pos[i]);
        }

        res.push_back(sh);
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

uint32_t llama_kv_cache_mixed::move_tokens_to_cold_cache(
                           uint32_t   strm,
                           uint32_t   n,
             llama_kv_mixed_trigger   trigger,
        const std::vector<uint32_t> & in_flight) {
    auto & hot  = kv_hot ->v_cells[strm];
    auto & cold = kv_cold->v_cells[strm];

    const int64_t t_start_us = ggml_time_us();

    // what: the oldest cells that are neither pinned nor in flight
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
        return cand.seqs.empty() || policy.is_pinned(cand.pos);
    }), cands.end());

    // where to: free cells in cold
    const auto dst = get_free_cold(strm, std::min({ n, policy.n_move_max(), (uint32_t) cands.size() }));
    const auto src = llama_kv_mixed_policy::select(std::move(cands), dst.size());

    if (src.empty()) {
        return 0;
    }

    llama_kv_mixed_event event = {};

    if (trace->is_on()) {
        event = make_event(LLAMA_KV_MIXED_EVENT_TRIGGER, strm);

        event.trigger  = trigger;
        event.n_tokens = src.size();
        event.pos_min  = INT32_MAX;

        for (const uint32_t i : src) {
            event.pos_min = std::min(event.pos_min, hot.pos_get(i));
            event.pos_max = std::max(event.pos_max, hot.pos_get(i));

            const auto & seqs = hot.seq_get_all(i);
            for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
                event.seqs[s/64] |= (uint64_t) seqs.test(s) << (s % 64);
            }
        }

        trace->push(event);
    }

    // the data
    {
        std::vector<int32_t> rows_src(src.begin(), src.end());
        std::vector<int64_t> rows_dst(dst.begin(), dst.end());

        for (size_t i = 0; i < src.size(); ++i) {
            rows_src[i] += strm*hot .size();
            rows_dst[i] += strm*cold.size();
        }

        // the rows may still be on their way
        if (lctx) {
            ggml_backend_sched_synchronize(lctx->get_sched());
        }

        const int n_threads = lctx ? lctx->n_threads() : std::clamp<int>(std::thread::hardware_concurrency(), 1, GGML_DEFAULT_N_THREADS);

        if (!mover->move(rows_src, rows_dst, n_threads)) {
            LLAMA_LOG_ERROR("%s: failed to copy %zu tokens from hot to cold, they stay hot\n", __func__, src.size());

            if (trace->is_on()) {
                event.kind = LLAMA_KV_MIXED_EVENT_FAIL;
                trace->push(event);
            }

            return 0;
        }
    }

    // the metadata
    for (size_t i = 0; i < src.size(); ++i) {
        set_cell(cold, dst[i], hot.pos_get(src[i]), hot.get_shift(src[i]), hot.ext_get(src[i]), hot.seq_get_all(src[i]));

        hot.rm(src[i]);
    }

    n_migrations   += 1;
    n_tokens_moved += src.size();
    t_migrate_us   += ggml_time_us() - t_start_us;

    if (trace->is_on()) {
        event.kind   = LLAMA_KV_MIXED_EVENT_MIGRATE;
        event.dur_us = ggml_time_us() - t_start_us;

        event.hot_used  = hot .get_used();
        event.cold_used = cold.get_used();

        for (size_t i = 0; i < kv_hot->layers.size(); ++i) {
            const auto & l_hot  = kv_hot ->layers[i];
            const auto & l_cold = kv_cold->layers[i];

            event.bytes_in  += src.size()*(l_hot .k->nb[1] + l_hot .v->nb[1]);
            event.bytes_out += src.size()*(l_cold.k->nb[1] + l_cold.v->nb[1]);
        }

        // the rows that left hot are still there, until new tokens take their cells
        std::vector<llama_kv_mixed_layer_error> errors;
        if (trace->has(LLAMA_KV_MIXED_TRACE_ERROR)) {
            measure_error(strm, src, dst, event, errors);
        }

        trace->push(event, errors);
    }

    return src.size();
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

//
// update
//

class llm_graph_input_k_shift_mixed : public llm_graph_input_i {
public:
    llm_graph_input_k_shift_mixed(const llama_kv_cache * kv) : kv(kv) {}
    virtual ~llm_graph_input_k_shift_mixed() = default;

    void set_input(const llama_ubatch * ubatch) override {
        GGML_UNUSED(ubatch);

        if (k_shift->buffer) {
            kv->set_input_k_shift(k_shift);
        }
        if (k_rot && k_rot->buffer) {
            kv->set_input_k_rot(k_rot);
        }
    }

    ggml_tensor * k_shift; // I32 [kv_size*n_stream]
    ggml_tensor * k_rot;   // F32 [n_rot, n_rot], null when the rows are not rotated

    const llama_kv_cache * kv;
};

ggml_cgraph * llama_kv_cache_mixed::build_graph_shift(llm_graph_result * res, llama_context * lctx) const {
    auto * ctx = res->get_ctx();
    auto * gf  = res->get_gf();

    const auto & cparams = lctx->get_cparams();

    for (const llama_kv_cache * kv : { kv_hot, kv_cold.get() }) {
        auto inp = std::make_unique<llm_graph_input_k_shift_mixed>(kv);

        const int64_t n_cells = (int64_t) kv->get_size()*kv->get_n_stream();

        inp->k_shift = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_cells);
        ggml_set_input(inp->k_shift);

        inp->k_rot = kv->build_input_k_rot(ctx);

        for (const auto & layer : kv->layers) {
            const uint32_t il = layer.il;

            if (!hparams.has_rope(il)) {
                continue;
            }

            const int64_t n_head_kv   = hparams.n_head_kv(il);
            const int64_t n_embd_head = hparams.n_embd_head_k(il);
            const int64_t n_rot       = hparams.n_rot(il);
            const int64_t n_nope      = hparams.n_lora_kv > 0 ? n_embd_head - n_rot : 0;

            ggml_tensor * k = ggml_view_3d(ctx, layer.k, n_embd_head, n_head_kv, n_cells,
                    ggml_row_size(layer.k->type, n_embd_head),
                    ggml_row_size(layer.k->type, n_embd_head*n_head_kv), 0);

            ggml_tensor * cur = ggml_cast(ctx, k, GGML_TYPE_F32);

            if (inp->k_rot) {
                cur = llama_mul_mat_hadamard(ctx, cur, inp->k_rot);
            }

            // the part of each head that carries the position
            ggml_tensor * rope = ggml_view_3d(ctx, cur, n_rot, n_head_kv, n_cells, cur->nb[1], cur->nb[2], n_nope*cur->nb[0]);

            rope = ggml_rope_ext_inplace(ctx, rope, inp->k_shift, model.get_rope_factors(cparams, il),
                    n_rot, hparams.rope_type, cparams.n_ctx_orig_yarn,
                    model.get_rope_freq_base(cparams, il), model.get_rope_freq_scale(cparams, il),
                    cparams.yarn_ext_factor, cparams.yarn_attn_factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow);

            // what follows reads the rows that this has changed in place
            ggml_build_forward_expand(gf, rope);

            if (inp->k_rot) {
                cur = llama_mul_mat_hadamard(ctx, cur, inp->k_rot);
            }

            ggml_build_forward_expand(gf, ggml_cpy(ctx, cur, k));
        }

        res->add_input(std::move(inp));
    }

    return gf;
}

// A scheduler over the devices of another one, with backends of its own: those of a context heed its abort callback, and a
// shift that was cut short could neither be finished nor undone.
struct shift_sched {
    std::vector<ggml_backend_ptr> backends;

    ggml_backend_sched_ptr sched; // null: out of memory

    shift_sched(ggml_backend_sched_t other, int n_threads, size_t graph_size) {
        std::vector<ggml_backend_t>             ptrs;
        std::vector<ggml_backend_buffer_type_t> bufts;

        for (int i = 0; i < ggml_backend_sched_get_n_backends(other); ++i) {
            ggml_backend_t backend = ggml_backend_sched_get_backend(other, i);

            ggml_backend_dev_t dev = ggml_backend_get_device(backend);

            backends.emplace_back(ggml_backend_dev_init(dev, nullptr));
            if (!backends.back()) {
                return;
            }

            ptrs .push_back(backends.back().get());
            bufts.push_back(ggml_backend_sched_get_buffer_type(other, backend));

            auto * set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
                    ggml_backend_dev_backend_reg(dev), "ggml_backend_set_n_threads");
            if (set_n_threads) {
                set_n_threads(ptrs.back(), n_threads);
            }
        }

        sched.reset(ggml_backend_sched_new(ptrs.data(), bufts.data(), ptrs.size(), graph_size, false, false));
    }
};

bool llama_kv_cache_mixed::update(llama_context * lctx) {
    if (!get_can_shift()) {
        LLAMA_LOG_ERROR("%s: this model does not support moving tokens to other positions\n", __func__);
        return false;
    }

    if (hparams.rope_type != LLAMA_ROPE_TYPE_NONE) {
        // the rows may still be on their way
        ggml_backend_sched_synchronize(lctx->get_sched());

        auto * res = lctx->get_gf_res_reserve();
        res->reset();

        auto * gf = build_graph_shift(res, lctx);

        const shift_sched own(lctx->get_sched(), lctx->n_threads(), ggml_graph_size(gf));

        if (!own.sched || !ggml_backend_sched_alloc_graph(own.sched.get(), gf)) {
            LLAMA_LOG_ERROR("%s: failed to allocate compute graph for K-shift\n", __func__);
            return false;
        }

        res->set_inputs(nullptr);

        if (ggml_backend_sched_graph_compute(own.sched.get(), gf) != GGML_STATUS_SUCCESS) {
            LLAMA_LOG_ERROR("%s: failed to compute K-shift\n", __func__);
            return false;
        }
    }

    for (llama_kv_cache * kv : { kv_hot, kv_cold.get() }) {
        for (auto & cells : kv->v_cells) {
            cells.reset_shift();
        }
    }

    return true;
}

//
// llama_kv_cache_mixed_context
//

llama_kv_cache_mixed_context::llama_kv_cache_mixed_context(llama_memory_status status) : llama_kv_cache_context(status) {}

llama_kv_cache_mixed_context::llama_kv_cache_mixed_context(
        llama_kv_cache_mixed * kv) : llama_kv_cache_context(kv), kv_mixed(kv), n_cold(kv->get_cold()->get_size()) {
}

llama_kv_cache_mixed_context::llama_kv_cache_mixed_context(
        llama_kv_cache_mixed * kv,
        llama_context * lctx,
        bool do_shift) : llama_kv_cache_context(kv, lctx, do_shift, {}), kv_mixed(kv) {
}

llama_kv_cache_mixed_context::llama_kv_cache_mixed_context(
        llama_kv_cache_mixed * kv,
        slot_info_vec_t sinfos,
        std::vector<llama_ubatch> ubatches) : llama_kv_cache_context(kv, std::move(sinfos), std::move(ubatches)), kv_mixed(kv) {
}

llama_kv_cache_mixed_context::~llama_kv_cache_mixed_context() {
    if (in_flight) {
        kv_mixed->drop(sinfos[i_cur], ubatches[i_cur]);
    }
}

bool llama_kv_cache_mixed_context::next() {
    in_flight = false;

    return llama_kv_cache_context::next();
}

bool llama_kv_cache_mixed_context::apply() {
    assert(!llama_memory_status_is_fail(status));

    // no ubatches -> this is a KV cache update
    if (ubatches.empty()) {
        // (where this is one of several caches, it may be another one that has something to do)
        return !do_shift || kv_mixed->update(lctx);
    }

    auto & sinfo = sinfos[i_cur];

    sinfo = kv_mixed->find_slot(ubatches[i_cur]);
    if (sinfo.empty()) {
        return false;
    }

    llama_kv_cache_context::apply();

    in_flight = true;

    kv_mixed->commit(sinfo);

    n_cold = kv_mixed->get_n_cold(sinfo);

    return true;
}

const llama_kv_cache_mixed * llama_kv_cache_mixed_context::get_kv() const {
    return kv_mixed;
}

uint32_t llama_kv_cache_mixed_context::get_n_cold() const {
    return n_cold;
}

ggml_tensor * llama_kv_cache_mixed_context::get_k_cold(ggml_context * ctx, int32_t il) const {
    return n_cold == 0 ? nullptr : kv_mixed->get_cold()->get_k(ctx, il, n_cold, sinfos[i_cur]);
}

ggml_tensor * llama_kv_cache_mixed_context::get_v_cold(ggml_context * ctx, int32_t il) const {
    return n_cold == 0 ? nullptr : kv_mixed->get_cold()->get_v(ctx, il, n_cold, sinfos[i_cur]);
}

void llama_kv_cache_mixed_context::set_input_kq_mask(ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));
    GGML_ASSERT(dst->ne[0] == (int64_t) n_cold + get_n_kv());

    const size_t  size_el = ggml_type_size(dst->type);
    const int64_t n_rows  = ggml_nrows(dst);

    std::vector<uint8_t> buf;

    size_t offs = 0;

    const auto fill = [&](const llama_kv_cache * kv_side, int64_t n_kv) {
        buf.resize(n_kv*n_rows*size_el);

        // a stand-in with the rows of this side
        ggml_tensor side = *dst;

        side.ne[0] = n_kv;
        side.data  = buf.data();

        kv_side->set_input_kq_mask(&side, ubatch, causal_attn);

        const size_t size_row = n_kv*size_el;
        for (int64_t i = 0; i < n_rows; ++i) {
            memcpy((char *) dst->data + i*dst->ne[0]*size_el + offs, buf.data() + i*size_row, size_row);
        }

        offs += size_row;
    };

    if (n_cold > 0) {
        fill(kv_mixed->get_cold(), n_cold);
    }
    fill(kv_mixed->get_hot(), get_n_kv());
}

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

//
// call sites in upstream's code
//

// why a model's memory can not be mixed, null when it can
static const char * unsupported_reason(const llama_model & model, const llama_memory_params & params) {
    const auto & hparams = model.hparams;

    if (llm_arch_is_recurrent(model.arch)) {
        return "its memory is a recurrent state, not a KV cache";
    }

    switch (model.arch) {
        case LLM_ARCH_MINIMAX_M3:
            return "its sparse attention (MSA) picks rows of one cache, which is not supported yet";
        case LLM_ARCH_DEEPSEEK4:
            return "its compressed attention (DSV4) keeps caches of its own, which is not supported yet";
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_DOTS3NOTE:
            return "its sparse attention (DSA) picks rows of one cache, which is not supported yet";
        case LLM_ARCH_QWEN4EXP:
            return "its sparse attention (QSA) picks rows of one cache, which is not supported yet";
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_GEMMA4_ASSISTANT:
            return "it is a draft model that lives on the cache of another one";
        case LLM_ARCH_PLM:
            return "its graph hands V over in a shape that only a transposed V cache takes";
        default:
            break;
    }

    if (hparams.is_mla()) {
        return "its multi-head latent attention (MLA) keeps no V rows, which is not supported yet";
    }
    if (hparams.n_rel_attn_bkts > 0) {
        return "its relative position buckets are computed for one cache only";
    }
    if (hparams.ple_n_heads > 0) {
        return "its n-gram embeddings look up earlier tokens in one cache only";
    }
    if (params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        return "a context of this type shares its cache with another one";
    }

    return nullptr;
}

[[noreturn]] static void fail(const std::string & reason) {
    llama_kv_mixed_error() = reason;
    throw std::runtime_error(reason);
}

static std::optional<llama_kv_mixed_params> requested_or_fail() {
    try {
        return llama_kv_mixed_params_requested();
    } catch (const std::invalid_argument & err) {
        fail(err.what());
    }
}

void llama_kv_mixed_check_model(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    // (other draft models have a context to draft for as well, and a cache of their own)
    if (model.arch == LLM_ARCH_GEMMA4_ASSISTANT && llama_kv_mixed_find(params.mem_other)) {
        fail(format("a %s model reads the rows of another context's cache, and that is a mixed one", llm_arch_name(model.arch)));
    }

    if (!requested_or_fail()) {
        return;
    }

    if (const char * reason = unsupported_reason(model, params)) {
        fail(format("no mixed KV cache for a %s model: %s", llm_arch_name(model.arch), reason));
    }

    if (!cparams.causal_attn) {
        fail("no mixed KV cache without causal attention: its batches can not be split to fit in hot");
    }
}

llama_memory_i * llama_kv_mixed_check_memory(llama_memory_i * mem) {
    if (requested_or_fail() && !llama_kv_mixed_find(mem)) {
        const bool none = mem == nullptr;
        delete mem;
        fail(none ? "no mixed KV cache for a model without a KV cache" : "no mixed KV cache for this model: its cache is of a kind that is not supported yet");
    }

    return mem;
}

llama_kv_cache * llama_kv_mixed_new_cache(
                            const llama_model & model,
                          const llama_hparams & hparams,
                                    ggml_type   type_k,
                                    ggml_type   type_v,
                                         bool   v_trans,
                                         bool   offload,
                                         bool   unified,
                                     uint32_t   kv_size,
                                     uint32_t   n_seq_max,
                                     uint32_t   n_pad,
                                     uint32_t   n_swa,
                               llama_swa_type   swa_type,
                               llama_memory_t   mem_other,
        const llama_memory_i::layer_filter_cb & filter,
        const  llama_memory_i::layer_reuse_cb & reuse,
        const  llama_memory_i::layer_share_cb & share) {
    const auto params = requested_or_fail();
    if (!params) {
        return new llama_kv_cache(
                model, hparams, type_k, type_v, v_trans, offload, unified, kv_size, n_seq_max, n_pad,
                n_swa, swa_type, mem_other, filter, reuse, share);
    }

    GGML_ASSERT(swa_type == LLAMA_SWA_TYPE_NONE && !mem_other);

    try {
        auto res = std::make_unique<llama_kv_cache_mixed>(
                model, hparams, type_k, type_v, *params, offload, unified, kv_size, n_seq_max, n_pad, filter, reuse);
        llama_kv_mixed_check_attn(model, *res);
        return res.release();
    } catch (const std::exception & err) {
        fail(err.what());
    }
}

llama_kv_cache_context * llama_kv_mixed_new_context(
                             llama_kv_cache * kv,
            llama_kv_cache::slot_info_vec_t   sinfos,
                  std::vector<llama_ubatch>   ubatches) {
    if (auto * mixed = dynamic_cast<llama_kv_cache_mixed *>(kv)) {
        return new llama_kv_cache_mixed_context(mixed, std::move(sinfos), std::move(ubatches));
    }

    return new llama_kv_cache_context(kv, std::move(sinfos), std::move(ubatches));
}

uint32_t llama_kv_mixed_n_ubatch(
                       const llama_kv_cache & kv,
                   const llama_batch_allocr & balloc,
            const std::vector<llama_ubatch> & ubatches,
                                   uint32_t   n_ubatch,
                                   uint32_t   n_tail) {
    const auto * mixed = dynamic_cast<const llama_kv_cache_mixed *>(&kv);

    return mixed ? mixed->get_n_ubatch(balloc, ubatches, n_ubatch, n_tail) : n_ubatch;
}

uint32_t llama_kv_mixed_n_ctx_seq(const llama_kv_cache & kv) {
    const auto * mixed = dynamic_cast<const llama_kv_cache_mixed *>(&kv);

    return mixed ? mixed->get_n_ctx_seq() : kv.get_size();
}

uint32_t llama_kv_mixed_n_cold(const llama_kv_cache_context * mctx) {
    const auto * mixed = dynamic_cast<const llama_kv_cache_mixed_context *>(mctx);

    return mixed ? mixed->get_n_cold() : 0;
}

void llama_kv_mixed_state_read(
       const llama_kv_cache & kv_attn,
             llama_memory_i & part,
             llama_memory_i & rest,
            llama_io_read_i & io,
               llama_seq_id   seq_id,
      llama_state_seq_flags   flags) {
    try {
        part.state_read(io, seq_id, flags);
    } catch (...) {
        if (dynamic_cast<const llama_kv_cache_mixed *>(&kv_attn)) {
            for (llama_memory_i * mem : { &part, &rest }) {
                if (seq_id == -1) {
                    mem->clear(true);
                } else {
                    mem->seq_rm(seq_id, -1, -1);
                }
            }
        }
        throw;
    }
}
