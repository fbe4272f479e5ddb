#include "api/api.h"

#include "attention/attention.h"
#include "cpu/isa.h"
#include "formats/formats.h"

static const llama_kv_mixed_isa & get_isa(const char * name) {
    const auto * res = llama_kv_mixed_get_isa(name);
    if (!res) {
        throw std::invalid_argument(format("this machine does not run '%s' (it has %s)", name, llama_kv_mixed_attn_isas()));
    }
    return *res;
}

//
// llama_kv_mixed_attn
//

static const llama_kv_mixed_isa & check_args(const llama_kv_mixed_attn_args * args, int32_t n_threads, const char * isa) {
    check(args->q && args->dst, "q and dst must not be NULL");
    if (n_threads < 1) {
        throw std::invalid_argument(format("n_threads=%d is below 1", n_threads));
    }
    if (args->n_embd_k < 1 || args->n_embd_v < 1 || args->n_head_kv < 1 || args->n_head < 1 || args->n_tokens < 1 || args->n_stream < 1) {
        throw std::invalid_argument("a size is below 1");
    }
    if (args->n_head % args->n_head_kv != 0) {
        throw std::invalid_argument("n_head_kv does not divide n_head");
    }
    if (!llama_kv_mixed_attn_supports(args->n_embd_k, args->n_embd_v, args->n_head/args->n_head_kv)) {
        throw std::invalid_argument(format("heads of more than %d values, or more than %d heads to a KV head",
            LLAMA_KV_MIXED_MAX_EMBD, LLAMA_KV_MIXED_ATTN_MAX_ROWS));
    }
    for (const auto & [n_rot, n_embd] : { std::pair(args->n_rot_k, args->n_embd_k), std::pair(args->n_rot_v, args->n_embd_v) }) {
        if (n_rot != 0 && (n_rot < 16 || (n_rot & (n_rot - 1)) != 0 || n_embd % n_rot != 0)) {
            throw std::invalid_argument(format("blocks of %d values can not be rotated in heads of %d", (int) n_rot, (int) n_embd));
        }
    }
    if (!(args->v_skip >= 0.0f && args->v_skip < 1.0f)) {
        throw std::invalid_argument(format("v_skip=%g is outside [0, 1)", args->v_skip));
    }
    for (const auto & seg : args->seg) {
        if (seg.n_kv < 0) {
            throw std::invalid_argument("n_kv is negative");
        }
        check(seg.n_kv == 0 || (seg.k && seg.v), "k and v must not be NULL");
        for (const auto & [type, n_embd] : { std::pair(seg.type_k, args->n_embd_k), std::pair(seg.type_v, args->n_embd_v) }) {
            if (!llama_kv_mixed_find_format(type)) {
                throw std::invalid_argument(format("the type %d is not a KV cache type", type));
            }
            if (n_embd % ggml_blck_size((ggml_type) type) != 0) {
                throw std::invalid_argument(format("a head of %d values is not made of whole blocks of %s",
                    (int) n_embd, ggml_type_name((ggml_type) type)));
            }
        }
    }

    if (args->k_mean && args->n_embd_k % LLAMA_KV_MIXED_BLOCK != 0) {
        throw std::invalid_argument(format("there are no means of heads of %d values, which are not a multiple of %d",
            (int) args->n_embd_k, LLAMA_KV_MIXED_BLOCK));
    }

    return get_isa(isa);
}

LLAMA_API int32_t llama_kv_mixed_attn(const llama_kv_mixed_attn_args * args, int32_t n_threads, const char * isa) {
    return guarded(-1, [&] {
        const auto full = copy_in(args, llama_kv_mixed_attn_args {});

        llama_kv_mixed_attn_compute(check_args(&full, n_threads, isa), full, n_threads);

        return 0;
    });
}

LLAMA_API int32_t llama_kv_mixed_quantize(
        const void * src, int32_t type_src, void * dst, int32_t type_dst, int64_t n_rows, int64_t n, int64_t n_rot, const char * isa) {
    return guarded(-1, [&] {
        check(src && dst && n_rows >= 0, "there are no rows");

        const auto & kernels = get_isa(isa);

        const auto * from = llama_kv_mixed_find_format(type_src, kernels);
        const auto * to   = llama_kv_mixed_find_format(type_dst, kernels);

        if (!from || !to || !llama_kv_mixed_can_quantize(*from, *to, n, n_rot)) {
            throw std::invalid_argument(format("rows of %d values of type %d, rotated in blocks of %d, do not go to type %d",
                (int) n, type_src, (int) n_rot, type_dst));
        }

        const size_t nb_src = ggml_row_size((ggml_type) type_src, n);
        const size_t nb_dst = ggml_row_size((ggml_type) type_dst, n);

        for (int64_t i = 0; i < n_rows; ++i) {
            kernels.quantize_row(*from, (const char *) src + i*nb_src, *to, (char *) dst + i*nb_dst, n, n_rot, nullptr);
        }

        return 0;
    });
}

LLAMA_API const char * llama_kv_mixed_attn_isas(void) {
    static const std::string res = llama_kv_mixed_get_isa_names();

    return res.c_str();
}
