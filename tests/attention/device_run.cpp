// Attention on a device of ggml's: requests on stdin, answers on stdout (requests.h).
// tools/gpu_check.py is the other side.
//
//     device-run [DEVICE [REPETITIONS]]
//
// DEVICE: as ggml names it, default: the first GPU. REPETITIONS: how often each graph is computed before its result is
// read (default 1); CUDA's backend replays a graph of its own from the third time on.

#include "device_attn.h"
#include "requests.h"

#include <chrono>
#include <map>
#include <random>

//
// attention, the join, migration
//

static std::vector<float> run_attn(const std::string & how) {
    const attn_data d = attn_data_read();
    const auto & r = d.r;

    graph g(128);

    attn_inputs in = {};
    in.scale         = r.scale;
    in.logit_softcap = r.logit_softcap;
    in.max_bias      = r.max_bias;

    in.q = g.add_queries(r.n_embd_k, r.n_head, r.n_tokens*r.n_stream, d.q);

    for (int i = 0; i < 2; ++i) {
        in.rows[i][0] = g.add_rows(r.seg[i].type_k, r.n_embd_k, r.n_head_kv, r.seg[i].n_kv, r.n_stream, d.rows[i][0]);
        in.rows[i][1] = g.add_rows(r.seg[i].type_v, r.n_embd_v, r.n_head_kv, r.seg[i].n_kv, r.n_stream, d.rows[i][1]);
    }
    if (!in.rows[1][0]) {
        throw refusal("attention without hot rows is not computed on a device");
    }

    // a graph always has a mask
    std::vector<ggml_fp16_t> mask(d.n_kv()*r.n_tokens*r.n_stream, ggml_fp32_to_fp16(0.0f));
    if (r.mask == 2) {
        memcpy(mask.data(), d.mask.data(), d.mask.size());
    } else if (r.mask == 4) {
        ggml_fp32_to_fp16_row((const float *) d.mask.data(), mask.data(), mask.size());
    }
    in.mask_f16 = g.add(GGML_TYPE_F16, { d.n_kv(), r.n_tokens, 1, r.n_stream }, mask);
    in.mask     = r.mask == 4 ? g.add(GGML_TYPE_F32, { d.n_kv(), r.n_tokens, 1, r.n_stream }, d.mask) : in.mask_f16;

    in.sinks  = r.sinks      ? g.add(GGML_TYPE_F32, { r.n_head }, d.sinks) : nullptr;
    in.mean   = g.add_means(r.n_embd_k*r.n_head_kv, r.n_page, r.n_stream, d.means);
    in.rot[0] = g.add_rot(r.n_rot_k);
    in.rot[1] = g.add_rot(r.n_rot_v);

    ggml_tensor * out = build_attn(g.ctx.get(), how, in);
    ggml_set_output(out);
    ggml_build_forward_expand(g.gf, out);

    return g.compute<float>(out);
}

static std::vector<uint16_t> run_join() {
    const auto r = request_read_one<join_request>();

    const auto cold  = request_read<uint8_t>(r.n_stream*r.n_cold*r.n_head_kv*r.row_cold);
    const auto hot   = request_read<uint8_t>(r.n_stream*r.n_hot *r.n_head_kv*r.row_hot);
    const auto means = request_read<uint16_t>(r.n_stream*r.n_page*r.n_head_kv*r.n_embd);

    graph g(16);

    ggml_tensor * out = build_join(g.ctx.get(),
        g.add_rows(r.type_cold, r.n_embd, r.n_head_kv, r.n_cold, r.n_stream, cold),
        g.add_rows(r.type_hot,  r.n_embd, r.n_head_kv, r.n_hot,  r.n_stream, hot),
        g.add_means(r.n_embd*r.n_head_kv, r.n_page, r.n_stream, means), g.add_rot(r.n_rot));
    ggml_set_output(out);
    ggml_build_forward_expand(g.gf, out);

    return g.compute<uint16_t>(out);
}

static void refuse_move(const std::string & how) {
    if (how == "move" && is_cpu()) {
        throw refusal("rows are moved by nodes on a device only");
    }
}

static std::vector<uint8_t> run_migration(const std::string & how) {
    const auto r   = request_read_one<migrate_request>();
    const auto src = request_read<uint8_t>(r.n_rows*ggml_row_size((ggml_type) r.type_src, r.n));

    refuse_move(how);

    // neighbours in turn, each to where it was
    std::vector<int32_t> from(r.n_rows);
    std::vector<int64_t> to  (r.n_rows);
    for (int64_t i = 0; i < r.n_rows; ++i) {
        from[i] = to[i] = (i ^ 1) < r.n_rows ? i ^ 1 : i;
    }

    graph g(32);

    ggml_tensor * dst  = ggml_new_tensor_2d(g.ctx_in.get(), (ggml_type) r.type_dst, r.n, r.n_rows);
    ggml_tensor * mean = r.n_page > 0 ? ggml_new_tensor_2d(g.ctx_in.get(), GGML_TYPE_F16, r.n, r.n_page) : nullptr;

    const auto build = how == "move" ? build_move : build_migration;

    g.compute<uint8_t>(
        build(g, add_migration_inputs(g, from, to), g.add((ggml_type) r.type_src, { r.n, r.n_rows }, src), dst, g.add_rot(r.n_rot), mean));

    std::vector<uint8_t> res(ggml_nbytes(dst));
    ggml_backend_tensor_get(dst, res.data(), 0, res.size());
    if (mean) {
        const size_t size = res.size();
        res.resize(size + ggml_nbytes(mean));
        ggml_backend_tensor_get(mean, res.data() + size, 0, ggml_nbytes(mean));
    }
    return res;
}

//
// times
//

// A graph of n_attn attentions, one after the other as the layers of a model have them. They take turns with n_sets sets
// of rows, so many that none is in the device's caches when its turn comes again.
struct time_request {
    int64_t n_head, n_head_kv, n_embd, n_cold, n_hot, n_tokens;
    int64_t type_cold_k, type_cold_v, type_hot_k, type_hot_v;
    int64_t n_rot_k, n_rot_v;
    int64_t n_attn, n_sets;
    int64_t n_min;   // repetitions at least
    double  seconds; // and so long
};

// cells of random rows
static const std::vector<uint8_t> & get_random_rows(int64_t type, int64_t n) {
    static std::map<std::pair<int64_t, int64_t>, std::vector<uint8_t>> all;

    auto & res = all[{ type, n }];
    if (res.empty()) {
        const int64_t n_rows = 512;

        std::mt19937 rng(1);
        std::normal_distribution<float> normal;

        std::vector<float> values(n_rows*n);
        for (float & x : values) {
            x = normal(rng);
        }

        res.resize(n_rows*ggml_row_size((ggml_type) type, n));
        ggml_quantize_chunk((ggml_type) type, values.data(), res.data(), 0, n_rows, n, nullptr);
    }
    return res;
}

static void build_attns(graph & g, const std::string & how, const time_request & r) {
    const int64_t n_kv = r.n_cold + r.n_hot;

    // the newest tokens are in the last cells
    std::vector<ggml_fp16_t> mask(n_kv*r.n_tokens, ggml_fp32_to_fp16(0.0f));
    for (int64_t t = 0; t < r.n_tokens; ++t) {
        for (int64_t i = std::max<int64_t>(n_kv - r.n_tokens + t + 1, 0); i < n_kv; ++i) {
            mask[t*n_kv + i] = ggml_fp32_to_fp16(-INFINITY);
        }
    }

    attn_inputs in = {};
    in.scale    = 1/sqrtf(r.n_embd);
    in.mask     = in.mask_f16 = g.add(GGML_TYPE_F16, { n_kv, r.n_tokens, 1, 1 }, mask);
    in.rot[0]   = g.add_rot(r.n_rot_k);
    in.rot[1]   = g.add_rot(r.n_rot_v);

    std::mt19937 rng(2);
    std::normal_distribution<float> normal;

    std::vector<float> q(r.n_tokens*r.n_head*r.n_embd);
    for (float & x : q) {
        x = normal(rng);
    }

    in.q = g.add(GGML_TYPE_F32, { r.n_embd, r.n_head, r.n_tokens }, q);

    const auto add = [&](int64_t type, int64_t n) {
        return g.add_rows(type, r.n_embd, r.n_head_kv, n, 1, get_random_rows(type, r.n_embd*r.n_head_kv));
    };

    std::vector<attn_inputs> sets(r.n_sets, in);
    for (auto & set : sets) {
        set.rows[0][0] = add(r.type_cold_k, r.n_cold);
        set.rows[0][1] = add(r.type_cold_v, r.n_cold);
        set.rows[1][0] = add(r.type_hot_k,  r.n_hot);
        set.rows[1][1] = add(r.type_hot_v,  r.n_hot);
    }

    for (int64_t i = 0; i < r.n_attn; ++i) {
        ggml_build_forward_expand(g.gf, build_attn(g.ctx.get(), how, sets[i % r.n_sets]));
    }
}

// n_tokens rows of K, less their means, and of V go from n_hot to n_cold
static void build_migrations(graph & g, const std::string & how, const time_request & r) {
    std::vector<int32_t> from(r.n_tokens);
    std::vector<int64_t> to  (r.n_tokens);
    for (int64_t i = 0; i < r.n_tokens; ++i) {
        from[i] = i*r.n_hot /r.n_tokens;
        to[i]   = i*r.n_cold/r.n_tokens;
    }

    const migration_inputs in = add_migration_inputs(g, from, to);

    ggml_tensor * rot_k = g.add_rot(r.n_rot_k);
    ggml_tensor * rot_v = g.add_rot(r.n_rot_v);

    const int64_t n      = r.n_embd*r.n_head_kv;
    const int64_t n_page = r.n_tokens/LLAMA_KV_MIXED_PAGE;

    const auto add = [&](int64_t type, int64_t n_rows) {
        return ggml_reshape_2d(g.ctx.get(), g.add_rows(type, n, 1, n_rows, 1, get_random_rows(type, n)), n, n_rows);
    };

    const auto build = how == "move" ? build_move : build_migration;

    for (int64_t i = 0; i < r.n_attn; ++i) {
        ggml_tensor * mean = n_page > 0 ? ggml_new_tensor_2d(g.ctx_in.get(), GGML_TYPE_F16, n, n_page) : nullptr;

        build(g, in, add(r.type_hot_k, r.n_hot), add(r.type_cold_k, r.n_cold), rot_k, mean);
        build(g, in, add(r.type_hot_v, r.n_hot), add(r.type_cold_v, r.n_cold), rot_v, nullptr);
    }
}

// microseconds per attention, or migration of a layer, of every repetition
static std::vector<double> run_time(const std::string & how) {
    const auto r = request_read_one<time_request>();

    refuse_move(how);

    graph g(64*r.n_attn);

    if (how == "migrate" || how == "move") {
        build_migrations(g, how, r);
    } else {
        build_attns(g, how, r);
    }

    g.alloc();

    std::vector<double> res;

    const auto measure = [&](size_t n_min, double seconds) {
        using clock = std::chrono::steady_clock;

        res.clear();
        const auto end = clock::now() + std::chrono::duration<double>(seconds);
        while (res.size() < n_min || clock::now() < end) {
            const auto start = clock::now();
            g.compute();
            res.push_back(std::chrono::duration<double, std::micro>(clock::now() - start).count()/r.n_attn);
        }
    };

    measure(4, r.seconds/4); // until clocks are up, and the graph is replayed
    measure(r.n_min, r.seconds);

    return res;
}

//
// what it is: name, description, bytes of memory, and whether there are kernels for our nodes; a line each
//

static std::vector<char> about() {
    size_t free, total;
    ggml_backend_dev_memory(dev, &free, &total);

    const std::string res = std::string(ggml_backend_dev_name(dev)) + "\n" + ggml_backend_dev_description(dev) + "\n" +
        std::to_string(total) + "\n" + (get_reason || is_cpu() ? "1" : "0");

    return std::vector<char>(res.begin(), res.end());
}

int main(int argc, char ** argv) {
    open_device(argc > 1 ? argv[1] : nullptr);
    if (argc > 2) {
        n_repeat = std::max(atoi(argv[2]), 1);
    }

    request_write_names("node join compose plain migrate move");

    for (request_header h; request_read_header(h);) {
        const std::string how(h.how, strnlen(h.how, sizeof(h.how)));
        try {
            switch (h.kind) {
                case REQUEST_ATTN:    request_answer(run_attn(how));   break;
                case REQUEST_JOIN:    request_answer(run_join());      break;
                case REQUEST_MIGRATE: request_answer(run_migration(how)); break;
                case REQUEST_TIME:    request_answer(run_time(how));   break;
                case REQUEST_ABOUT:   request_answer(about());         break;
                default:
                    fprintf(stderr, "device-run: there are no requests of kind %d\n", (int) h.kind);
                    return 1;
            }
        } catch (const refusal & e) {
            request_refuse(e.what());
        }
    }

    backend.reset();

    return 0;
}
