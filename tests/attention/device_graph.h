#pragma once

// Graphs on a device of ggml's, for device_run.cpp: what is given, what is computed, and why it can not be.

#include "attention/attention.h"
#include "ops/op.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

// why it can not be computed
struct refusal : std::runtime_error {
    using std::runtime_error::runtime_error;
};

//
// the device
//

typedef const char * (*reason_t)(ggml_backend_dev_t dev, const ggml_tensor * node);

static ggml_backend_dev_t dev;
static ggml_backend_ptr   backend;
static reason_t           get_reason;  // null: it does not know nodes of ours
static int                n_repeat = 1;

static std::string get_name() {
    return ggml_backend_dev_name(dev);
}

static bool is_cpu() {
    return ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

static bool is_cuda() {
    return std::string(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev))) == "CUDA";
}

static void open_device(const char * name) {
    ggml_backend_load_all();

    dev = name ? ggml_backend_dev_by_name(name) : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU);
    if (!dev) {
        fprintf(stderr, "device-run: there is no %s; devices:", name ? name : "GPU");
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            fprintf(stderr, " %s", ggml_backend_dev_name(ggml_backend_dev_get(i)));
        }
        fprintf(stderr, "\n");
        exit(1);
    }

    backend.reset(ggml_backend_dev_init(dev, nullptr));
    if (!backend) {
        fprintf(stderr, "device-run: %s can not be initialised\n", ggml_backend_dev_name(dev));
        exit(1);
    }

    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);

    get_reason = (reason_t) ggml_backend_reg_get_proc_address(reg, LLAMA_KV_MIXED_OP_REASON);

    auto * set_n_threads = (ggml_backend_set_n_threads_t)
        ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set_n_threads) {
        set_n_threads(backend.get(), 1);
    }
}

//
// graphs
//

struct graph {
    ggml_context_ptr        ctx_in; // what is given
    ggml_context_ptr        ctx;    // what is computed, and views
    ggml_backend_buffer_ptr buf;
    ggml_gallocr_ptr        galloc;

    ggml_cgraph * gf;

    std::vector<std::function<void()>> fills; // what writes the given tensors

    explicit graph(size_t n_nodes) {
        const size_t n = n_nodes + 64;

        ctx_in.reset(ggml_init({ n*ggml_tensor_overhead(), nullptr, true }));
        ctx   .reset(ggml_init({ 2*n*ggml_tensor_overhead() + ggml_graph_overhead_custom(n, false), nullptr, true }));
        gf = ggml_new_graph_custom(ctx.get(), n, false);
        galloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend.get())));
    }

    template <typename T>
    ggml_tensor * add(ggml_type type, std::vector<int64_t> ne, const std::vector<T> & data) {
        ggml_tensor * res = ggml_new_tensor(ctx_in.get(), type, ne.size(), ne.data());
        fills.push_back([res, data]() {
            GGML_ASSERT(data.size()*sizeof(T) == ggml_nbytes(res));
            ggml_backend_tensor_set(res, data.data(), 0, ggml_nbytes(res));
        });
        return res;
    }

    // a view of n cells of each stream of a cache that has more, which are NaN: [n_embd, n_head_kv, n, n_stream]
    // data: these cells, or fewer, which are written over and over
    ggml_tensor * add_rows(
            int64_t type, int64_t n_embd, int64_t n_head_kv, int64_t n, int64_t n_stream,
            const std::vector<uint8_t> & data) {
        if (n == 0) {
            return nullptr;
        }

        const int64_t n_all = GGML_PAD(n, 32) + 32;

        ggml_tensor * all = ggml_new_tensor_4d(ctx_in.get(), (ggml_type) type, n_embd, n_head_kv, n_all, n_stream);

        const size_t size = n*all->nb[2];

        fills.push_back([=, &data]() {
            for (int64_t s = 0; s < n_stream; ++s) {
                size_t first = data.size() == n_stream*size ? s*size : 0;
                for (size_t i = 0; i < size; ) {
                    const size_t part = std::min(size - i, data.size() - first);
                    ggml_backend_tensor_set(all, data.data() + first, s*all->nb[3] + i, part);
                    i += part;
                }
            }
        });

        return ggml_view_4d(ctx.get(), all, n_embd, n_head_kv, n, n_stream, all->nb[1], all->nb[2], all->nb[3], 0);
    }

    // a view of n_head heads of each token, as where Q, K and V are the product of one matrix: those behind are NaN
    ggml_tensor * add_queries(int64_t n_embd, int64_t n_head, int64_t n, const std::vector<float> & data) {
        ggml_tensor * all = ggml_new_tensor_3d(ctx_in.get(), GGML_TYPE_F32, n_embd, n_head + 2, n);
        fills.push_back([=, &data]() {
            for (int64_t i = 0; i < n; ++i) {
                ggml_backend_tensor_set(all, data.data() + i*n_embd*n_head, i*all->nb[2], n_head*all->nb[1]);
            }
        });
        return ggml_view_3d(ctx.get(), all, n_embd, n_head, n, all->nb[1], all->nb[2], 0);
    }

    // F16 [n_embd, n_page, n_stream], null where there are none
    ggml_tensor * add_means(int64_t n_embd, int64_t n_page, int64_t n_stream, const std::vector<uint16_t> & data) {
        return n_page > 0 ? add(GGML_TYPE_F16, { n_embd, n_page, n_stream }, data) : nullptr;
    }

    // null where n is 0
    ggml_tensor * add_rot(int64_t n) {
        if (n == 0) {
            return nullptr;
        }

        std::vector<float> data(n*n);
        for (int64_t i = 0; i < n*n; ++i) {
            bool negative = false;
            for (int64_t bits = (i/n) & (i % n); bits; bits &= bits - 1) {
                negative = !negative;
            }
            data[i] = (negative ? -1 : 1)/sqrtf(n);
        }
        return add(GGML_TYPE_F32, { n, n }, data);
    }

    // throws a refusal when the device does not have all that the graph needs
    void alloc() {
        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            const ggml_tensor * node = ggml_graph_node(gf, i);

            llama_kv_mixed_op op;
            if (llama_kv_mixed_op_read(node, op)) {
                if (get_reason) {
                    if (const char * reason = get_reason(dev, node)) {
                        throw refusal(reason);
                    }
                } else if (!is_cpu()) {
                    throw refusal(get_name() + " has no kernels for nodes of the mixed cache");
                }
            } else if (!ggml_backend_dev_supports_op(dev, node)) {
                throw refusal(get_name() + " has no " + ggml_op_desc(node) + " of " +
                    ggml_type_name(node->src[0]->type) + " to " + ggml_type_name(node->type));
            }
        }

        buf.reset(ggml_backend_alloc_ctx_tensors(ctx_in.get(), backend.get()));
        if (!buf || !ggml_gallocr_alloc_graph(galloc.get(), gf)) {
            throw refusal(get_name() + " has not enough memory");
        }

        ggml_backend_buffer_clear(buf.get(), 0xFF); // NaN
        for (const auto & fill : fills) {
            fill();
        }
    }

    void compute() {
        if (ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
            throw refusal(get_name() + " has failed to compute the graph");
        }
    }

    template <typename T>
    std::vector<T> compute(ggml_tensor * out) {
        std::vector<T> res(ggml_nbytes(out)/sizeof(T));
        alloc();
        for (int i = 0; i < n_repeat; ++i) {
            ggml_backend_tensor_memset(out, 0xFF, 0, ggml_nbytes(out));
            compute();
        }
        ggml_backend_tensor_get(out, res.data(), 0, ggml_nbytes(out));
        return res;
    }
};
