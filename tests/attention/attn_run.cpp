// The kernels for tests under an emulator: requests on stdin, outputs on stdout, without Python and libllama.
// First it writes the names of its instruction sets, as a line. tests/helpers/emulated.py is the other side.

#include "requests.h"

#include "attention/attention.h"
#include "formats/formats.h"

#include "ggml.h"

static void run_attn(const llama_kv_mixed_isa & isa) {
    const attn_data d = attn_data_read();

    std::vector<float> dst(d.n_out());
    llama_kv_mixed_attn_compute(isa, attn_data_args(d, dst.data()), (int) d.r.n_threads);

    request_answer(dst);
}

static void run_quantize(const llama_kv_mixed_isa & isa) {
    const auto r = request_read_one<quantize_request>();

    const auto & from = *llama_kv_mixed_find_format((int32_t) r.type_src, isa);
    const auto & to   = *llama_kv_mixed_find_format((int32_t) r.type_dst, isa);

    const size_t nb_src = ggml_row_size((ggml_type) r.type_src, r.n);
    const size_t nb_dst = ggml_row_size((ggml_type) r.type_dst, r.n);

    const auto src = request_read<uint8_t>(r.n_rows*nb_src);
    std::vector<uint8_t> dst(r.n_rows*nb_dst);
    for (int64_t i = 0; i < r.n_rows; ++i) {
        isa.quantize_row(from, src.data() + i*nb_src, to, dst.data() + i*nb_dst, r.n, r.n_rot, nullptr);
    }

    request_answer(dst);
}

int main() {
    request_write_names(llama_kv_mixed_get_isa_names());

    for (request_header h; request_read_header(h);) {
        const auto * isa = llama_kv_mixed_get_isa(h.how);
        if (!isa || h.kind > REQUEST_QUANTIZE) {
            fprintf(stderr, "no kernel '%s' for requests of kind %d\n", h.how, (int) h.kind);
            return 1;
        }
        (h.kind == REQUEST_ATTN ? run_attn : run_quantize)(*isa);
    }

    return 0;
}
