// The kernels for CUDA, emulated on the CPU, for tests: requests on stdin, answers on stdout (requests.h). They have one name
// for each number of query rows that a block takes.

#include "cuda_emulated.h"
#include "requests.h"

#include <stdexcept>
#include <string>

static void run_attn(int n_col) {
    const auto d = attn_data_read();

    std::vector<float> dst(d.n_out(), NAN);

    const auto args = attn_data_args(d, dst.data());

    if (args.n_embd_k != args.n_embd_v) {
        return request_refuse("there is no kernel for the size of its heads");
    }
    if (!args.mask || !args.mask_f16) {
        return request_refuse("there is no kernel for a mask that is not F16");
    }
    for (const auto & seg : args.seg) {
        if (kv_get_format(seg.type_k) < 0 || kv_get_format(seg.type_v) < 0) {
            return request_refuse("there is no kernel for rows of that type");
        }
    }

    if (!kv_is_size(args.n_embd_k)) {
        return request_refuse("there is no kernel for the size of its heads");
    }

    emulate_attn(args, n_col);

    request_answer(dst);
}

static void run_join() {
    const auto r = request_read_one<join_request>();

    const auto cold  = request_read<uint8_t>(r.n_stream*r.n_cold*r.n_head_kv*r.row_cold);
    const auto hot   = request_read<uint8_t>(r.n_stream*r.n_hot *r.n_head_kv*r.row_hot);
    const auto means = request_read<uint16_t>(r.n_stream*r.n_page*r.n_head_kv*r.n_embd);

    std::vector<uint16_t> dst(r.n_stream*(r.n_cold + r.n_hot)*r.n_head_kv*r.n_embd, 0x7E00);

    const auto tensor = [&](const void * data, int64_t type, int64_t row, int64_t n) {
        ggml_tensor res = {};
        res.type = (ggml_type) type;
        res.data = const_cast<void *>(data);
        res.ne[0] = r.n_embd;
        res.ne[1] = r.n_head_kv;
        res.ne[2] = n;
        res.ne[3] = r.n_stream;
        res.nb[1] = row;
        res.nb[2] = res.nb[1]*r.n_head_kv;
        res.nb[3] = res.nb[2]*n;
        return res;
    };
    const auto t_cold = tensor(cold.data(), r.type_cold, r.row_cold, r.n_cold);
    const auto t_hot  = tensor(hot .data(), r.type_hot,  r.row_hot,  r.n_hot);
    const auto t_mean = tensor(means.data(), GGML_TYPE_F16, r.n_head_kv*r.n_embd*2, r.n_page);

    llama_kv_mixed_join_args args = { r.n_embd, r.n_head_kv, r.n_cold, r.n_hot, r.n_stream, r.n_rot, &t_cold, &t_hot, r.n_page ? &t_mean : nullptr };

    // (the means' dimensions are page, stream)
    ggml_tensor mean = t_mean;
    mean.nb[1] = r.n_head_kv*r.n_embd*2;
    mean.nb[2] = mean.nb[1]*r.n_page;
    if (r.n_page) {
        args.mean = &mean;
    }

    if (!kv_is_size(r.n_embd) || kv_get_format(r.type_cold) < 0 || kv_get_format(r.type_hot) < 0) {
        return request_refuse("there is no kernel for such rows");
    }

    emulate_join(args, dst.data());

    request_answer(dst);
}

static void run_migrate() {
    const auto r = request_read_one<migrate_request>();

    const auto src = request_read<uint8_t>(r.n_rows*ggml_row_size((ggml_type) r.type_src, r.n));

    const size_t n_bytes = r.n_rows*ggml_row_size((ggml_type) r.type_dst, r.n);

    std::vector<uint8_t> res(n_bytes + r.n_page*r.n*sizeof(ggml_fp16_t), 0xFF);

    // from the last row to the first one
    std::vector<int32_t> row_from(r.n_rows), page(r.n_rows);
    std::vector<int64_t> row_to(r.n_rows), page_new(r.n_page);
    for (int64_t i = 0; i < r.n_rows; ++i) {
        row_from[i] = row_to[i] = r.n_rows - 1 - i;
        page[i] = row_to[i]/LLAMA_KV_MIXED_PAGE;
    }
    for (int64_t i = 0; i < r.n_page; ++i) {
        page_new[i] = i;
    }

    kv_mixed_move p = {};
    p.from        = (const char *) src.data();
    p.row_from    = row_from.data();
    p.format_from = kv_get_format(r.type_src);
    p.format_to   = kv_get_format(r.type_dst);
    p.n           = r.n_rows;
    p.n_embd      = r.n;
    p.n_rot       = r.n_rot;

    if (kv_get_move_blocks(p) == 0 || !kv_can_store(p.format_to)) {
        return request_refuse("there is no kernel for such rows");
    }

    if (r.n_page > 0) {
        p.page   = page.data();
        p.to     = (char *) res.data() + n_bytes;
        p.row_to = page_new.data();
        p.n_to   = r.n_page;
        emulate_move(p, true);
        p.mean   = p.to;
    }

    p.to     = (char *) res.data();
    p.row_to = row_to.data();
    p.n_to   = r.n_rows;
    emulate_move(p, false);

    request_answer(res);
}

int main() {
    request_write_names("cuda-8 cuda-16");

    for (request_header h; request_read_header(h);) {
        if (h.kind == REQUEST_ATTN) {
            run_attn(std::string(h.how) == "cuda-8" ? 8 : 16);
        } else if (h.kind == REQUEST_JOIN) {
            run_join();
        } else if (h.kind == REQUEST_MIGRATE) {
            run_migrate();
        } else {
            fprintf(stderr, "there is no such request\n");
            return 1;
        }
    }

    return 0;
}
