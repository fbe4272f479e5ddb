#pragma once

#include "llama-kv-mixed.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <unistd.h>

//
// what the programs of these tests are asked for on stdin, and how they answer on stdout; tests/helpers/requests.py
// is the other side
//
// First a program writes a line: the names of the ways in which it can compute. A request is a header, the struct of
// its kind, and the bytes of arrays. An answer is its number of bytes and these; or the negative number of bytes of a
// sentence, and that sentence: why it can not be computed.
//

enum request_kind : int64_t {
    REQUEST_ATTN,
    REQUEST_QUANTIZE,
    REQUEST_JOIN,
    REQUEST_MIGRATE,
    REQUEST_TIME,
    REQUEST_ABOUT,
};

struct request_header {
    char    how[16]; // one of the names
    int64_t kind;
};

struct attn_request {
    int64_t n_threads;
    int64_t n_embd_k, n_embd_v, n_head, n_head_kv, n_tokens, n_stream;
    struct { int64_t type_k, type_v, n_kv, row_k, row_v; } seg[2]; // bytes of a row of one head
    int64_t mask;                                                  // bytes of an element, 0: no mask
    int64_t sinks;                                                 // 1: there are some
    int64_t n_rot_k, n_rot_v;
    int64_t n_page;                                                // of means, 0: there are none
    double  scale, logit_softcap, max_bias, v_skip;
};

// rows that are stored as another type; the answer is their bytes
struct quantize_request {
    int64_t type_src, type_dst, n_rows, n, n_rot;
};

// cold rows as numbers, then hot ones rotated: F16 [n_stream][n_cold + n_hot][n_head_kv][n_embd]
struct join_request {
    int64_t n_embd, n_head_kv, n_stream;
    int64_t type_cold, n_cold, row_cold;
    int64_t type_hot,  n_hot,  row_hot;
    int64_t n_rot;
    int64_t n_page; // of means, 0: there are none
};

// Rows that are rotated, and stored as another type; of K less the mean of their page, which has LLAMA_KV_MIXED_PAGE of them.
// The answer is their bytes, then the means: F16 [n_page][n].
struct migrate_request {
    int64_t type_src, type_dst, n_rows, n, n_rot;
    int64_t n_page; // that their rows fill, 0: they are stored as they are
};

// in a block of its own, so that a sanitizer sees what is read beyond it
template <typename T>
static std::vector<T> request_read(size_t n) {
    std::vector<T> res(n);
    if (fread(res.data(), sizeof(T), n, stdin) != n) {
        fprintf(stderr, "the request is cut off\n");
        exit(1);
    }
    return res;
}

template <typename T>
static T request_read_one() {
    return request_read<T>(1)[0];
}

// false: there are no more requests
inline bool request_read_header(request_header & h) {
    return fread(&h, sizeof(h), 1, stdin) == 1;
}

// Answers go where stdout was, and what else is written there, by a kernel or a tool around the program, goes to stderr.
inline FILE * request_out() {
    static FILE * res = [] {
        fflush(stdout);
        FILE * out = fdopen(dup(1), "wb");
        dup2(2, 1);
        return out;
    }();
    return res;
}

inline void request_write_names(const std::string & names) {
    fprintf(request_out(), "%s\n", names.c_str());
    fflush(request_out());
}

template <typename T>
static void request_answer(const std::vector<T> & res) {
    const int64_t n = res.size()*sizeof(T);
    fwrite(&n, sizeof(n), 1, request_out());
    fwrite(res.data(), sizeof(T), res.size(), request_out());
    fflush(request_out());
}

inline void request_refuse(const std::string & reason) {
    const int64_t n = -(int64_t) reason.size();
    fwrite(&n, sizeof(n), 1, request_out());
    fwrite(reason.data(), 1, reason.size(), request_out());
    fflush(request_out());
}

// a request for attention with its arrays, each without gaps
struct attn_data {
    attn_request r;

    std::vector<float>    q;          // [n_stream][n_tokens][n_head][n_embd_k]
    std::vector<uint8_t>  rows[2][2]; // cold, hot; K, V: [n_stream][n_kv][n_head_kv]
    std::vector<uint8_t>  mask;       // [n_stream][n_tokens][cold cells, then hot ones]
    std::vector<float>    sinks;      // [n_head]
    std::vector<uint16_t> means;      // [n_stream][n_page][n_head_kv][n_embd_k]

    int64_t n_kv() const { return r.seg[0].n_kv + r.seg[1].n_kv; }

    size_t n_out() const { return r.n_stream*r.n_tokens*r.n_head*r.n_embd_v; }
};

inline attn_data attn_data_read() {
    attn_data d;
    d.r = request_read_one<attn_request>();

    const auto & r = d.r;

    d.q = request_read<float>(r.n_stream*r.n_tokens*r.n_head*r.n_embd_k);
    for (int i = 0; i < 2; ++i) {
        const int64_t n = r.n_stream*r.seg[i].n_kv*r.n_head_kv;

        d.rows[i][0] = request_read<uint8_t>(n*r.seg[i].row_k);
        d.rows[i][1] = request_read<uint8_t>(n*r.seg[i].row_v);
    }
    d.mask  = request_read<uint8_t>(r.mask*r.n_stream*r.n_tokens*d.n_kv());
    d.sinks = request_read<float>(r.sinks ? r.n_head : 0);
    d.means = request_read<uint16_t>(r.n_stream*r.n_page*r.n_head_kv*r.n_embd_k);

    return d;
}

// for kernels in the host's memory; dst: n_out() values
inline llama_kv_mixed_attn_args attn_data_args(const attn_data & d, float * dst) {
    const auto & r = d.r;

    llama_kv_mixed_attn_args a = {};
    a.struct_size   = sizeof(a);
    a.n_embd_k      = r.n_embd_k;
    a.n_embd_v      = r.n_embd_v;
    a.n_head        = r.n_head;
    a.n_head_kv     = r.n_head_kv;
    a.n_tokens      = r.n_tokens;
    a.n_stream      = r.n_stream;
    a.scale         = (float) r.scale;
    a.logit_softcap = (float) r.logit_softcap;
    a.max_bias      = (float) r.max_bias;
    a.v_skip        = (float) r.v_skip;
    a.n_rot_k       = r.n_rot_k;
    a.n_rot_v       = r.n_rot_v;

    a.q       = d.q.data();
    a.nb_q[0] = sizeof(float)*r.n_embd_k;
    a.nb_q[1] = a.nb_q[0]*r.n_head;
    a.nb_q[2] = a.nb_q[1]*r.n_tokens;

    for (int i = 0; i < 2; ++i) {
        auto & seg = a.seg[i];
        seg.type_k = (int32_t) r.seg[i].type_k;
        seg.type_v = (int32_t) r.seg[i].type_v;
        seg.n_kv   = r.seg[i].n_kv;

        seg.k = d.rows[i][0].data();
        seg.v = d.rows[i][1].data();

        seg.nb_k[0] = r.seg[i].row_k;
        seg.nb_v[0] = r.seg[i].row_v;
        for (int dim = 1; dim < 3; ++dim) {
            const int64_t ne = dim == 1 ? r.n_head_kv : seg.n_kv;
            seg.nb_k[dim] = seg.nb_k[dim - 1]*ne;
            seg.nb_v[dim] = seg.nb_v[dim - 1]*ne;
        }
    }

    if (r.mask > 0) {
        a.mask       = d.mask.data();
        a.mask_f16   = r.mask == 2;
        a.nb_mask[0] = r.mask*d.n_kv();
        a.nb_mask[1] = r.mask*d.n_kv()*r.n_tokens;
    }

    if (r.sinks) {
        a.sinks = d.sinks.data();
    }

    if (r.n_page > 0) {
        a.k_mean       = d.means.data();
        a.nb_k_mean[0] = sizeof(uint16_t)*r.n_embd_k;
        a.nb_k_mean[1] = a.nb_k_mean[0]*r.n_head_kv;
        a.nb_k_mean[2] = a.nb_k_mean[1]*r.n_page;
    }

    a.dst = dst;

    return a;
}
