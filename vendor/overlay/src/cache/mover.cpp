#include "cache/mover.h"

#include "cpu/host.h"
#include "cpu/isa.h"
#include "formats/formats.h"
#include "ops/device.h"

#include "llama-impl.h"

#include "ggml-backend.h"

#include <algorithm>
#include <stdexcept>

void llama_kv_mixed_moves::append(const llama_kv_mixed_moves & others) {
    src     .insert(src     .end(), others.src     .begin(), others.src     .end());
    dst     .insert(dst     .end(), others.dst     .begin(), others.dst     .end());
    page    .insert(page    .end(), others.page    .begin(), others.page    .end());
    page_new.insert(page_new.end(), others.page_new.begin(), others.page_new.end());
}

// by the kernels
static bool is_fused(const llama_kv_mixed_mover::pair & p) {
    const auto * from = llama_kv_mixed_find_format(p.src->type);
    const auto * to   = llama_kv_mixed_find_format(p.dst->type);

    return llama_kv_mixed_is_on_host(p.src) && llama_kv_mixed_is_on_host(p.dst) &&
        from && to && llama_kv_mixed_can_quantize(*from, *to, p.src->ne[0], p.n_rot);
}

// by the kernels of the device that holds them
static bool is_op(ggml_backend_dev_t dev, const llama_kv_mixed_mover::pair & p) {
    ggml_context_ptr ctx(ggml_init({ /*.mem_size =*/ 16*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true }));

    llama_kv_mixed_mover::op_inputs in = {};
    in.row_from = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, 1);
    in.row_to   = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, 1);
    in.page     = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, 1);
    in.page_new = in.row_to;

    for (const ggml_tensor * node : llama_kv_mixed_mover::build_ops(ctx.get(), p, in)) {
        if (!llama_kv_mixed_op_reason(dev, node).empty()) {
            return false;
        }
    }
    return true;
}

// per pair: two flattened tensors, the rows, the write, a matrix, the product and two views of what that takes and gives; for
// means the flattened tensor, the rows by channel in two steps, their product, its write, the means of rows and the difference
// all pairs: the inputs, and the nodes of the kernels
static size_t n_tensors(size_t n_pairs) {
    return 15*n_pairs + 7;
}

llama_kv_mixed_mover::llama_kv_mixed_mover(const std::vector<pair> & pairs, uint32_t n_max) {
    std::vector<ggml_backend_dev_t> order;

    for (const auto & p : pairs) {
        const ggml_backend_dev_t dev = llama_kv_mixed_get_dev(p.src);
        GGML_ASSERT(dev == llama_kv_mixed_get_dev(p.dst));

        size_t i = std::find(order.begin(), order.end(), dev) - order.begin();
        if (i == order.size()) {
            order.push_back(dev);
            devs.emplace_back();
        }
        (is_fused(p) ? devs[i].pairs_fused : is_op(dev, p) ? devs[i].pairs_op : devs[i].pairs).push_back(p);
    }

    for (size_t i = 0; i < devs.size(); ++i) {
        auto & dev = devs[i];

        dev.backend.reset(ggml_backend_dev_init(order[i], nullptr));
        if (!dev.backend) {
            throw std::runtime_error(format("failed to initialize %s for migrations", ggml_backend_dev_name(order[i])));
        }

        auto * set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
                ggml_backend_dev_backend_reg(order[i]), "ggml_backend_set_n_threads");
        if (set_n_threads) {
            dev.set_n_threads = [set_n_threads, backend = dev.backend.get()](int n) { set_n_threads(backend, n); };
        }

        const size_t n = n_tensors(dev.pairs.size() + dev.pairs_op.size());
        dev.buf_meta.resize(n*ggml_tensor_overhead() + ggml_graph_overhead_custom(n, false));

        dev.galloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(dev.backend.get())));

        graph g = build(dev, n_max, n_max);

        // a pair's nodes end with the write of its rows
        for (int j = 0, i_pair = 0; j < ggml_graph_n_nodes(g.gf); ++j) {
            const ggml_tensor * node = ggml_graph_node(g.gf, j);
            if (node->op != GGML_OP_CUSTOM && !ggml_backend_supports_op(dev.backend.get(), node)) {
                const auto & p = dev.pairs.at(i_pair);
                throw std::runtime_error(format("%s can not move %s rows to %s, it has no %s of %s rows to %s: "
                    "take another cold type, or keep the cache in the CPU's memory (offload_kqv=false)",
                    ggml_backend_dev_name(order[i]), ggml_type_name(p.src->type), ggml_type_name(p.dst->type),
                    ggml_op_desc(node), ggml_type_name(node->src[0]->type), ggml_type_name(node->type)));
            }
            i_pair += node->op == GGML_OP_SET_ROWS && node->src[1] == g.dst;
        }

        if (!ggml_gallocr_reserve(dev.galloc.get(), g.gf)) {
            throw std::runtime_error(format("failed to allocate the buffer for migrations on %s", ggml_backend_dev_name(order[i])));
        }
    }
}

// of all streams: [n_embd, rows]
static ggml_tensor * flatten(ggml_context * ctx, ggml_tensor * t) {
    return ggml_reshape_2d(ctx, t, t->ne[0], t->ne[1]*t->ne[2]);
}

std::vector<ggml_tensor *> llama_kv_mixed_mover::build_ops(ggml_context * ctx, const pair & p, const op_inputs & in) {
    std::vector<ggml_tensor *> res;

    ggml_tensor * from = flatten(ctx, p.src);
    ggml_tensor * mean = p.mean ? flatten(ctx, p.mean) : nullptr;

    if (mean && in.page_new) {
        llama_kv_mixed_op op = llama_kv_mixed_op_of(LLAMA_KV_MIXED_OP_MEAN);
        op.n_rot_k = p.n_rot;

        res.push_back(llama_kv_mixed_build_op(ctx, op, GGML_TYPE_I32, { 1 }, { from, mean, in.row_from, in.page_new, in.page, nullptr }));
    }

    llama_kv_mixed_op op = llama_kv_mixed_op_of(LLAMA_KV_MIXED_OP_MOVE);
    op.n_rot_k = p.n_rot;

    res.push_back(llama_kv_mixed_build_op(ctx, op, GGML_TYPE_I32, { 1 }, { from, flatten(ctx, p.dst), in.row_from, in.row_to, mean ? in.page : nullptr, mean }));

    return res;
}

llama_kv_mixed_mover::graph llama_kv_mixed_mover::build(device & dev, uint32_t n, uint32_t n_new) {
    graph res = {};

    res.ctx.reset(ggml_init({
        /*.mem_size   =*/ dev.buf_meta.size(),
        /*.mem_buffer =*/ dev.buf_meta.data(),
        /*.no_alloc   =*/ true,
    }));

    ggml_context * ctx = res.ctx.get();

    res.gf  = ggml_new_graph_custom(ctx, n_tensors(dev.pairs.size() + dev.pairs_op.size()), false);
    res.src = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    res.dst = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n);

    const auto has_mean = [](const pair & p) { return p.mean != nullptr; };

    const bool is_any_fused  = std::any_of(dev.pairs_fused.begin(), dev.pairs_fused.end(), has_mean);
    const bool is_any_op     = std::any_of(dev.pairs_op   .begin(), dev.pairs_op   .end(), has_mean);
    const bool is_any_others = std::any_of(dev.pairs      .begin(), dev.pairs      .end(), has_mean);

    if (is_any_fused || is_any_op || is_any_others) {
        res.page = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
        if (n_new > 0) {
            res.page_new = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_new);
        }
    }
    if (is_any_others && n_new > 0) {
        res.share = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, n_new);
    }

    for (ggml_tensor * t : { res.src, res.dst, res.page, res.page_new, res.share }) {
        if (t) {
            ggml_set_input(t);
        }
    }

    const auto flat = [ctx](ggml_tensor * t) { return flatten(ctx, t); };

    if (!dev.pairs_fused.empty()) {
        ggml_tensor * args[4] = { res.src, res.dst, res.page, res.page_new };

        const auto add_node = [&](int n_args, ggml_custom_op_t f) {
            ggml_build_forward_expand(res.gf, ggml_custom_4d(ctx, GGML_TYPE_I32, 1, 1, 1, 1, args, n_args, f, GGML_N_TASKS_MAX, &dev));
        };

        if (is_any_fused && n_new > 0) {
            add_node(4, make_means);
        }
        add_node(is_any_fused ? 3 : 2, quantize);
    }

    for (const auto & p : dev.pairs_op) {
        for (ggml_tensor * node : build_ops(ctx, p, { res.src, res.dst, res.page, res.page_new })) {
            ggml_build_forward_expand(res.gf, node);
        }
    }

    for (const auto & p : dev.pairs) {
        ggml_tensor * rows = ggml_get_rows(ctx, flat(p.src), res.src);

        if (p.n_rot > 0) {
            ggml_tensor *& rot = res.rots[p.rot];
            if (!rot) {
                rot = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, p.n_rot, p.n_rot);
                ggml_set_input(rot);
            }
            rows = llama_mul_mat_hadamard(ctx, rows, rot);
        }

        if (p.mean) {
            ggml_tensor * mean = flat(p.mean);
            if (n_new > 0) {
                ggml_tensor * by_channel = ggml_cont(ctx, ggml_transpose(ctx, rows));
                mean = ggml_set_rows(ctx, mean, ggml_mul_mat(ctx, by_channel, res.share), res.page_new);
            }
            rows = ggml_sub(ctx, rows, ggml_get_rows(ctx, mean, res.page));
        }

        ggml_build_forward_expand(res.gf, ggml_set_rows(ctx, flat(p.dst), rows, res.dst));
    }

    return res;
}

void llama_kv_mixed_mover::quantize(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & isa = *llama_kv_mixed_get_isa();

    const auto & pairs = ((const device *) userdata)->pairs_fused;

    const auto * rows_src = (const int32_t *) dst->src[0]->data;
    const auto * rows_dst = (const int64_t *) dst->src[1]->data;
    const auto * pages    = dst->src[2] ? (const int32_t *) dst->src[2]->data : nullptr;

    const int64_t n_rows  = dst->src[0]->ne[0];
    const int64_t n_total = n_rows*pairs.size();

    for (int64_t i = n_total*ith/nth; i < n_total*(ith + 1)/nth; ++i) {
        const auto & p = pairs[i/n_rows];
        const char * src  = (const char *) p.src->data + rows_src[i % n_rows]*p.src->nb[1];
        char       * res  = (char *)       p.dst->data + rows_dst[i % n_rows]*p.dst->nb[1];
        const char * mean = p.mean ? (const char *) p.mean->data + pages[i % n_rows]*p.mean->nb[1] : nullptr;
        isa.quantize_row(*llama_kv_mixed_find_format(p.src->type), src, *llama_kv_mixed_find_format(p.dst->type), res, p.src->ne[0], p.n_rot, mean);
    }
}

void llama_kv_mixed_mover::make_means(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & isa = *llama_kv_mixed_get_isa();

    const auto & pairs = ((const device *) userdata)->pairs_fused;

    const auto * rows_src  = (const int32_t *) dst->src[0]->data;
    const auto * pages     = (const int32_t *) dst->src[2]->data;
    const auto * pages_new = (const int64_t *) dst->src[3]->data;

    const int64_t n_rows  = dst->src[0]->ne[0];
    const int64_t n_new   = dst->src[3]->ne[0];
    const int64_t n_total = n_new*pairs.size();

    std::vector<int32_t> rows;

    for (int64_t i = n_total*ith/nth; i < n_total*(ith + 1)/nth; ++i) {
        const auto & p = pairs[i/n_new];
        if (!p.mean) {
            continue;
        }

        const int64_t page = pages_new[i % n_new];

        rows.clear();
        for (int64_t r = 0; r < n_rows; ++r) {
            if (pages[r] == page) {
                rows.push_back(rows_src[r]);
            }
        }

        isa.mean_rows(*llama_kv_mixed_find_format(p.src->type), p.src->data, p.src->nb[1], rows.data(), rows.size(), p.src->ne[0], p.n_rot,
            (char *) p.mean->data + page*p.mean->nb[1]);
    }
}

// how much of each row is in each new mean: [n_new][n]
static std::vector<float> get_shares(const llama_kv_mixed_moves & moves) {
    std::vector<float> res(moves.page_new.size()*moves.size(), 0.0f);

    for (size_t i = 0; i < moves.page_new.size(); ++i) {
        const auto n = std::count(moves.page.begin(), moves.page.end(), moves.page_new[i]);

        for (size_t r = 0; r < moves.size(); ++r) {
            res[i*moves.size() + r] = moves.page[r] == moves.page_new[i] ? 1.0f/n : 0.0f;
        }
    }

    return res;
}

// the scheduler's own of a device, null: it has none
static ggml_backend_t find_backend(ggml_backend_sched_t sched, ggml_backend_dev_t dev) {
    for (int i = 0; sched && i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(backend) == dev) {
            return backend;
        }
    }
    return nullptr;
}

bool llama_kv_mixed_mover::move(const llama_kv_mixed_moves & moves, int n_threads, ggml_backend_sched_t sched) {
    GGML_ASSERT(moves.src.size() == moves.dst.size());

    for (auto & dev : devs) {
        ggml_backend_dev_t device = ggml_backend_get_device(dev.backend.get());

        ggml_backend_t queue = dev.can_queue() ? find_backend(sched, device) : nullptr;
        if (!queue && sched) {
            ggml_backend_sched_synchronize(sched);
        }
        ggml_backend_t backend = queue ? queue : dev.backend.get();

        graph g = build(dev, moves.size(), moves.page_new.size());

        if (!ggml_gallocr_alloc_graph(dev.galloc.get(), g.gf)) {
            return false;
        }

        order & o = dev.orders[dev.n_orders++ % dev.orders.size()];
        if (o.done) {
            ggml_backend_event_synchronize(o.done.get());
        }
        o.moves = moves;

        const auto set = [backend](ggml_tensor * t, const void * data) {
            ggml_backend_tensor_set_async(backend, t, data, 0, ggml_nbytes(t));
        };

        set(g.src, o.moves.src.data());
        set(g.dst, o.moves.dst.data());

        if (g.page) {
            GGML_ASSERT(moves.page.size() == moves.size());
            set(g.page, o.moves.page.data());
        }
        if (g.page_new) {
            set(g.page_new, o.moves.page_new.data());
        }
        const auto shares = g.share ? get_shares(moves) : std::vector<float>(); // (ggml's operations, which are waited for)
        if (g.share) {
            set(g.share, shares.data());
        }
        for (const auto & [data, rot] : g.rots) {
            set(rot, data);
        }

        if (!queue && dev.set_n_threads) {
            dev.set_n_threads(n_threads);
        }

        const auto status = ggml_backend_graph_compute_async(backend, g.gf);
        if (status != GGML_STATUS_SUCCESS) {
            ggml_backend_synchronize(backend);
            return false;
        }
        if (queue && !o.done) {
            o.done.reset(ggml_backend_event_new(device));
        }
        if (queue && o.done) {
            ggml_backend_event_record(o.done.get(), queue);
        } else {
            ggml_backend_synchronize(backend);
        }
    }

    if (n_fail > 0) {
        n_fail--;
        return false;
    }

    return true;
}
