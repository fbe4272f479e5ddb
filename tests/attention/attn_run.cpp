// The kernels for tests under an emulator: requests on stdin, outputs on stdout, without Python and libllama.
// First it writes the names of its instruction sets, as a line. tests/helpers/emulated.py is the other side.

#include "attention/attention.h"
#include "formats/formats.h"

#include "ggml.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

// what comes before every request
struct header {
    char    isa[16];
    int64_t what; // 0: attention, 1: quantisation
};

struct attn_request {
    int64_t n_threads;
    int64_t n_embd_k, n_embd_v, n_head, n_head_kv, n_tokens, n_stream;
    struct { int64_t type_k, type_v, n_kv, row_k, row_v; } seg[2]; // bytes of a row of one head
    int64_t mask;                                                  // bytes of an element, 0: no mask
    int64_t sinks;                                                 // 1: there are some
    int64_t n_rot_k, n_rot_v;
    int64_t n_page;                                                // of means, 0: there are none
    double  scale, logit_softcap, max_bias;
};

// in a block of its own, so that a sanitizer sees what is read beyond it
template <typename T>
static std::vector<T> read(size_t n) {
    std::vector<T> res(n);
    if (fread(res.data(), sizeof(T), n, stdin) != n) {
        fprintf(stderr, "the request is cut off\n");
        exit(1);
    }
    return res;
}

template <typename T>
static T read_one() {
    return read<T>(1)[0];
}

template <typename T>
static void write(const std::vector<T> & res) {
    fwrite(res.data(), sizeof(T), res.size(), stdout);
    fflush(stdout);
}

static void run_attn(const llama_kv_mixed_isa & isa) {
    const auto r = read_one<attn_request>();

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
    a.n_rot_k       = r.n_rot_k;
    a.n_rot_v       = r.n_rot_v;

    const auto q = read<float>(r.n_stream*r.n_tokens*r.n_head*r.n_embd_k);
    a.q       = q.data();
    a.nb_q[0] = sizeof(float)*r.n_embd_k;
    a.nb_q[1] = a.nb_q[0]*r.n_head;
    a.nb_q[2] = a.nb_q[1]*r.n_tokens;

    std::vector<uint8_t> rows[2][2];
    int64_t n_kv = 0;
    for (int i = 0; i < 2; ++i) {
        auto & seg = a.seg[i];
        seg.type_k = (int32_t) r.seg[i].type_k;
        seg.type_v = (int32_t) r.seg[i].type_v;
        seg.n_kv   = r.seg[i].n_kv;

        const int64_t n = r.n_stream*seg.n_kv*r.n_head_kv;
        rows[i][0] = read<uint8_t>(n*r.seg[i].row_k);
        rows[i][1] = read<uint8_t>(n*r.seg[i].row_v);
        seg.k = rows[i][0].data();
        seg.v = rows[i][1].data();

        seg.nb_k[0] = r.seg[i].row_k;
        seg.nb_v[0] = r.seg[i].row_v;
        for (int d = 1; d < 3; ++d) {
            const int64_t ne = d == 1 ? r.n_head_kv : seg.n_kv;
            seg.nb_k[d] = seg.nb_k[d - 1]*ne;
            seg.nb_v[d] = seg.nb_v[d - 1]*ne;
        }
        n_kv += seg.n_kv;
    }

    const auto mask = read<uint8_t>(r.mask*r.n_stream*r.n_tokens*n_kv);
    if (r.mask > 0) {
        a.mask       = mask.data();
        a.mask_f16   = r.mask == 2;
        a.nb_mask[0] = r.mask*n_kv;
        a.nb_mask[1] = r.mask*n_kv*r.n_tokens;
    }

    const auto sinks = read<float>(r.sinks ? r.n_head : 0);
    if (r.sinks) {
        a.sinks = sinks.data();
    }

    const auto means = read<uint16_t>(r.n_stream*r.n_page*r.n_head_kv*r.n_embd_k);
    if (r.n_page > 0) {
        a.k_mean       = means.data();
        a.nb_k_mean[0] = sizeof(uint16_t)*r.n_embd_k;
        a.nb_k_mean[1] = a.nb_k_mean[0]*r.n_head_kv;
        a.nb_k_mean[2] = a.nb_k_mean[1]*r.n_page;
    }

    std::vector<float> dst(r.n_stream*r.n_tokens*r.n_head*r.n_embd_v);
    a.dst = dst.data();

    llama_kv_mixed_attn_compute(isa, a, (int) r.n_threads);

    write(dst);
}

struct quantize_request {
    int64_t type_src, type_dst, n_rows, n, n_rot;
};

static void run_quantize(const llama_kv_mixed_isa & isa) {
    const auto r = read_one<quantize_request>();

    const auto & from = *llama_kv_mixed_find_format((int32_t) r.type_src, isa);
    const auto & to   = *llama_kv_mixed_find_format((int32_t) r.type_dst, isa);

    const size_t nb_src = ggml_row_size((ggml_type) r.type_src, r.n);
    const size_t nb_dst = ggml_row_size((ggml_type) r.type_dst, r.n);

    const auto src = read<uint8_t>(r.n_rows*nb_src);
    std::vector<uint8_t> dst(r.n_rows*nb_dst);
    for (int64_t i = 0; i < r.n_rows; ++i) {
        isa.quantize_row(from, src.data() + i*nb_src, to, dst.data() + i*nb_dst, r.n, r.n_rot, nullptr);
    }

    write(dst);
}

int main() {
    printf("%s\n", llama_kv_mixed_get_isa_names().c_str());
    fflush(stdout);

    for (header h; fread(&h, sizeof(h), 1, stdin) == 1;) {
        const auto * isa = llama_kv_mixed_get_isa(h.isa);
        if (!isa) {
            fprintf(stderr, "no kernel '%s'\n", h.isa);
            return 1;
        }
        (h.what == 0 ? run_attn : run_quantize)(*isa);
    }

    return 0;
}
