// K rows are rotated to the new positions of their tokens (K-shift)
//
// A shift that stopped half way must neither be done again nor be forgotten. So rows are computed layer by layer beside
// the old ones, and put in place when a whole layer is there; of a stream whose layers are not all done it is remembered
// which are, and the next attempt goes on with the others.

#include "cache/kv-cache-mixed.h"
#include "cache/state-io.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <set>

// The devices of a context's scheduler, with backends of their own: those of a context heed its abort callback, and a
// shift would be left half done more often than need be.
struct llama_kv_cache_mixed::shift_devices {
    std::vector<ggml_backend_ptr>           backends;
    std::vector<ggml_backend_buffer_type_t> bufts;

    // throws std::runtime_error when a backend can not be made
    explicit shift_devices(ggml_backend_sched_t other) {
        for (int i = 0; i < ggml_backend_sched_get_n_backends(other); ++i) {
            ggml_backend_t     backend = ggml_backend_sched_get_backend(other, i);
            ggml_backend_dev_t dev     = ggml_backend_get_device(backend);

            backends.emplace_back(ggml_backend_dev_init(dev, nullptr));
            if (!backends.back()) {
                throw std::runtime_error(format("failed to initialize %s for K-shift", ggml_backend_dev_name(dev)));
            }

            bufts.push_back(ggml_backend_sched_get_buffer_type(other, backend));
        }
    }

    void set_n_threads(int n_threads) const {
        for (const auto & backend : backends) {
            auto * set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
                    ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get())), "ggml_backend_set_n_threads");
            if (set) {
                set(backend.get(), n_threads);
            }
        }
    }

    // null: out of memory
    ggml_backend_sched_ptr new_sched() {
        std::vector<ggml_backend_t> ptrs;
        for (const auto & backend : backends) {
            ptrs.push_back(backend.get());
        }

        // a graph is one layer
        return ggml_backend_sched_ptr(ggml_backend_sched_new(ptrs.data(), bufts.data(), ptrs.size(), 128, false, false));
    }
};

// the rows of one layer, from the first to the last cell of a stream that has moved
struct llama_kv_cache_mixed::shift_graph {
    ggml_cgraph * gf;

    ggml_tensor * shift; // I32 [n]
    ggml_tensor * rot;   // F32 [n_rot, n_rot], null when the rows are not rotated

    ggml_tensor * rows;  // in the cache
    ggml_tensor * res;   // what they are to be

    // of their pages, null: rows are stored as they are
    ggml_tensor * turn;      // I32 [n_page]
    ggml_tensor * is_turned; // F32 [1, n_page], 1 or 0
    ggml_tensor * means;     // F16 [n_embd_k_gqa, n_page], in the cache
    ggml_tensor * res_means; // what they are to be
};

llama_kv_cache_mixed::shift_graph llama_kv_cache_mixed::build_shift(llama_context * lctx, const shift_job & job, size_t i_layer) const {
    const auto & layer   = job.kv->layers[i_layer];
    const auto & cparams = lctx->get_cparams();

    const uint32_t il = layer.il;

    auto * graph = lctx->get_gf_res_reserve();
    graph->reset();

    auto * ctx = graph->get_ctx();

    const int64_t n           = job.shift.size();
    const int64_t n_head_kv   = hparams.n_head_kv(il);
    const int64_t n_embd_head = hparams.n_embd_head_k(il);
    const int64_t n_rot       = hparams.n_rot(il);
    const int64_t n_nope      = hparams.n_lora_kv > 0 ? n_embd_head - n_rot : 0;

    ggml_tensor * k = layer.k_stream[job.strm];

    const size_t size_head = ggml_row_size(k->type, n_embd_head);
    const size_t size_row  = ggml_row_size(k->type, n_embd_head*n_head_kv);

    const bool has_means = means && job.kv == kv_cold.get();

    shift_graph res = {};

    res.gf    = graph->get_gf();
    res.shift = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    res.rot   = job.kv->build_input_k_rot(ctx);
    res.rows  = ggml_view_3d(ctx, k, n_embd_head, n_head_kv, n, size_head, size_row, job.first*size_row);

    ggml_set_input(res.shift);

    // rows F32 [n_embd_head, n_head_kv, n], as they are stored, at their new positions
    const auto turn = [&](ggml_tensor * cur, ggml_tensor * shift) {
        if (res.rot) {
            cur = llama_mul_mat_hadamard(ctx, cur, res.rot);
        }

        // the part of each head that carries the position
        ggml_tensor * rope = ggml_view_3d(ctx, cur, n_rot, n_head_kv, cur->ne[2], cur->nb[1], cur->nb[2], n_nope*cur->nb[0]);

        rope = ggml_rope_ext_inplace(ctx, rope, shift, model.get_rope_factors(cparams, il),
                n_rot, hparams.rope_type, cparams.n_ctx_orig_yarn,
                model.get_rope_freq_base(cparams, il), model.get_rope_freq_scale(cparams, il),
                cparams.yarn_ext_factor, cparams.yarn_attn_factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow);

        // what follows reads the rows that this has changed in place
        ggml_build_forward_expand(res.gf, rope);

        return res.rot ? llama_mul_mat_hadamard(ctx, cur, res.rot) : cur;
    };

    const auto to_3d = [&](ggml_tensor * t) { return ggml_reshape_3d(ctx, t, n_embd_head, n_head_kv, t->ne[1]); };
    const auto to_2d = [&](ggml_tensor * t) { return ggml_reshape_2d(ctx, t, n_embd_head*n_head_kv, t->ne[2]); };

    ggml_tensor * cur = ggml_cast(ctx, res.rows, GGML_TYPE_F32);

    if (has_means) {
        ggml_tensor * t = means->get(i_layer);

        const int64_t n_page = job.turn.size();

        res.turn      = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_page);
        res.is_turned = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, n_page);
        res.means     = ggml_view_2d(ctx, t, t->ne[0], n_page, t->nb[1],
            means->get_offset(i_layer, job.strm, llama_kv_mixed_means::page_of(job.first)));

        ggml_set_input(res.turn);
        ggml_set_input(res.is_turned);

        ggml_tensor * old    = ggml_cast(ctx, res.means, GGML_TYPE_F32);
        ggml_tensor * turned = to_2d(turn(to_3d(ggml_cast(ctx, res.means, GGML_TYPE_F32)), res.turn));

        // those that stay do so bit for bit
        res.res_means = ggml_add(ctx, old, ggml_mul(ctx, ggml_sub(ctx, turned, old), res.is_turned));
        res.res_means = ggml_cast(ctx, res.res_means, GGML_TYPE_F16);

        ggml_set_output(res.res_means);
        ggml_build_forward_expand(res.gf, res.res_means);

        cur = to_3d(llama_kv_mixed_add_means(ctx, to_2d(cur), old));
    }

    cur = turn(cur, res.shift);

    if (has_means) {
        cur = to_3d(llama_kv_mixed_sub_means(ctx, to_2d(cur), res.res_means));
    }

    res.res = ggml_cast(ctx, cur, k->type);

    ggml_set_output(res.res);
    ggml_build_forward_expand(res.gf, res.res);

    return res;
}

bool llama_kv_cache_mixed::compute_shift(llama_context * lctx, ggml_backend_sched_t sched, const shift_job & job, size_t i_layer) {
    const shift_graph g = build_shift(lctx, job, i_layer);

    ggml_backend_sched_reset(sched);

    if (!ggml_backend_sched_alloc_graph(sched, g.gf)) {
        LLAMA_LOG_ERROR("%s: failed to allocate compute graph for K-shift\n", __func__);
        return false;
    }

    ggml_backend_tensor_set(g.shift, job.shift.data(), 0, ggml_nbytes(g.shift));
    if (g.rot) {
        job.kv->set_input_k_rot(g.rot);
    }
    if (g.turn) {
        std::vector<float> is_turned;
        for (const llama_pos turn : job.turn) {
            is_turned.push_back(turn != 0 ? 1.0f : 0.0f);
        }

        ggml_backend_tensor_set(g.turn,      job.turn .data(), 0, ggml_nbytes(g.turn));
        ggml_backend_tensor_set(g.is_turned, is_turned.data(), 0, ggml_nbytes(g.is_turned));
    }

    const bool is_failing = n_shift_fail == 0;
    n_shift_fail -= n_shift_fail >= 0;

    if (ggml_backend_sched_graph_compute(sched, g.gf) != GGML_STATUS_SUCCESS || is_failing) {
        LLAMA_LOG_ERROR("%s: failed to compute K-shift\n", __func__);
        return false;
    }

    // rows of cells that have not moved stay bit for bit
    const size_t size_row = ggml_nbytes(g.res)/job.shift.size();

    std::vector<uint32_t> moved;
    for (uint32_t i = 0; i < job.shift.size(); ++i) {
        if (job.shift[i] != 0) {
            moved.push_back(i);
        }
    }

    if (moved.size() == job.shift.size()) {
        ggml_backend_tensor_copy(g.res, g.rows);
    } else {
        std::vector<uint8_t> buf;
        for_each_run(moved, [&](uint32_t first, size_t n) {
            buf.resize(n*size_row);
            ggml_backend_tensor_get(g.res,  buf.data(), first*size_row, buf.size());
            ggml_backend_tensor_set(g.rows, buf.data(), first*size_row, buf.size());
        });
    }

    if (g.means) {
        ggml_backend_tensor_copy(g.res_means, g.means);
    }

    return true;
}

std::vector<llama_pos> llama_kv_cache_mixed::get_turns(const llama_kv_cells & cells, uint32_t first, uint32_t end) {
    std::vector<llama_pos> res;

    for (uint32_t page = first; page < end; page += LLAMA_KV_MIXED_PAGE) {
        std::set<llama_pos> shifts;

        for (uint32_t i = page; i < std::min(end, page + LLAMA_KV_MIXED_PAGE); ++i) {
            if (!cells.is_empty(i)) {
                shifts.insert(cells.get_shift(i));
            }
        }

        res.push_back(shifts.size() == 1 ? *shifts.begin() : 0);
    }

    return res;
}

void llama_kv_cache_mixed::settle_shift(const shift_job & job) {
    auto & cells = job.kv->v_cells[job.strm];

    // what was added since the shift began
    std::vector<llama_pos> rest(cells.size(), 0);

    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i)) {
            const bool is_part = i >= job.first && i < job.first + job.shift.size();

            rest[i] = cells.get_shift(i) - (is_part ? job.shift[i - job.first] : 0);
        }
    }

    cells.reset_shift();

    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (rest[i] != 0) {
            const llama_pos                 pos  = cells.pos_get(i);
            const llama_kv_cell_ext         ext  = cells.ext_get(i);
            const llama_kv_cells::seq_set_t seqs = cells.seq_get_all(i);

            cells.rm(i);
            set_cell(cells, i, pos, rest[i], ext, seqs);
        }
    }
}

void llama_kv_cache_mixed::add_shift_jobs(llama_kv_cache & kv, std::vector<shift_job> & jobs) const {
    for (uint32_t s = 0; s < kv.get_n_stream(); ++s) {
        auto & cells = kv.v_cells[s];

        if (!cells.get_has_shift()) {
            continue;
        }

        uint32_t first = cells.size();
        uint32_t end   = 0;

        for (uint32_t i = 0; i < cells.size(); ++i) {
            if (!cells.is_empty(i) && cells.get_shift(i) != 0) {
                first = std::min(first, i);
                end   = i + 1;
            }
        }

        const bool has_means = means && &kv == kv_cold.get();

        if (has_means && end > 0) {
            first = first/LLAMA_KV_MIXED_PAGE*LLAMA_KV_MIXED_PAGE;
            end   = std::min((uint32_t) cells.size(), GGML_PAD(end, LLAMA_KV_MIXED_PAGE));
        }

        shift_job job = { &kv, s, std::min(first, end), {}, 0, {} };

        if (has_means) {
            job.turn = get_turns(cells, job.first, end);
        }

        for (uint32_t i = job.first; i < end; ++i) {
            job.shift.push_back(cells.is_empty(i) ? 0 : cells.get_shift(i));
        }

        jobs.push_back(std::move(job));
    }
}

bool llama_kv_cache_mixed::run_shift_jobs(llama_context * lctx, std::vector<shift_job> & jobs) {
    const auto has_rows = [this](const shift_job & job, size_t i_layer) {
        return hparams.rope_type != LLAMA_ROPE_TYPE_NONE && !job.shift.empty() && hparams.has_rope(job.kv->layers[i_layer].il);
    };

    // the rows may still be on their way
    ggml_backend_sched_synchronize(lctx->get_sched());

    if (!shift_devs) {
        try {
            shift_devs = std::make_shared<shift_devices>(lctx->get_sched());
        } catch (const std::exception & err) {
            LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
            return false;
        }
    }

    shift_devs->set_n_threads(lctx->n_threads());

    // its memory is not kept
    const ggml_backend_sched_ptr sched = shift_devs->new_sched();

    // all memory before the first change
    bool res = sched != nullptr;

    for (const auto & job : jobs) {
        for (size_t i = job.n_done; i < job.kv->layers.size() && res; ++i) {
            res = !has_rows(job, i) || ggml_backend_sched_reserve(sched.get(), build_shift(lctx, job, i).gf);
        }
    }

    if (!res) {
        LLAMA_LOG_ERROR("%s: failed to allocate compute graph for K-shift\n", __func__);
        return false;
    }

    while (!jobs.empty()) {
        auto & job = jobs.front();

        for (; job.n_done < job.kv->layers.size(); ++job.n_done) {
            if (has_rows(job, job.n_done) && !compute_shift(lctx, sched.get(), job, job.n_done)) {
                return false;
            }
        }

        settle_shift(job);

        jobs.erase(jobs.begin());
    }

    return true;
}

bool llama_kv_cache_mixed::finish_shift(llama_kv_cache * rest) const {
    if (shift_jobs.empty() && !rest) {
        return true;
    }

    // (what it changes is not what the cache holds)
    auto & self = const_cast<llama_kv_cache_mixed &>(*this);

    return lctx && (rest ? self.shift(lctx, { rest }) : self.shift(lctx, {}));
}

bool llama_kv_cache_mixed::shift(llama_context * lctx, const std::vector<llama_kv_cache *> & kvs) {
    if (!shift_jobs.empty() && !run_shift_jobs(lctx, shift_jobs)) {
        return false;
    }

    std::vector<shift_job> jobs;

    for (llama_kv_cache * kv : kvs) {
        add_shift_jobs(*kv, jobs);
    }

    if (jobs.empty()) {
        return true;
    }

    if (!get_can_shift()) {
        LLAMA_LOG_ERROR("%s: this model does not support moving tokens to other positions\n", __func__);
        return false;
    }

    if (run_shift_jobs(lctx, jobs)) {
        return true;
    }

    // those that have not begun are still what their cells say
    jobs.erase(std::remove_if(jobs.begin(), jobs.end(), [](const shift_job & job) { return job.n_done == 0; }), jobs.end());

    shift_jobs = std::move(jobs);

    return false;
}

bool llama_kv_cache_mixed::update(llama_context * lctx) {
    return shift(lctx, { kv_hot, kv_cold.get() });
}

bool llama_kv_cache_mixed::update(llama_context * lctx, llama_kv_cache & kv, const stream_copy_info & sc_info) {
    // copies of streams are upstream's; where a shift of the source is half done, so it is of the copy
    kv.update(lctx, false, sc_info);

    for (size_t i = 0; i < sc_info.ssrc.size(); ++i) {
        copy_shift_jobs(kv, sc_info.ssrc[i], sc_info.sdst[i]);
    }

    return shift(lctx, { &kv });
}

void llama_kv_cache_mixed::copy_shift_jobs(const llama_kv_cache & kv, uint32_t ssrc, uint32_t sdst) {
    shift_jobs.erase(std::remove_if(shift_jobs.begin(), shift_jobs.end(), [&](const shift_job & job) {
        return job.kv == &kv && job.strm == sdst;
    }), shift_jobs.end());

    for (size_t i = 0; i < shift_jobs.size(); ++i) {
        if (shift_jobs[i].kv == &kv && shift_jobs[i].strm == ssrc) {
            shift_jobs.push_back(shift_jobs[i]);
            shift_jobs.back().strm = sdst;
        }
    }
}

bool llama_kv_cache_mixed::is_shift_pending() const {
    return kv_hot->get_has_shift() || kv_cold->get_has_shift() || (kv_rest && kv_rest->get_has_shift()) || !shift_jobs.empty();
}
