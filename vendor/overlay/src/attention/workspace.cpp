#include "attention/workspace.h"

#include "attention/attention.h"
#include "attention/products.h"

llama_kv_mixed_attn_layout llama_kv_mixed_attn_make_layout(const llama_kv_mixed_attn_plan & plan, int64_t size_query) {
    llama_kv_mixed_attn_layout res = {};

    // whole cache lines
    const auto take = [&](int64_t n, int64_t count = 1) {
        const llama_kv_mixed_attn_layout::arrays cur = { res.size, (size_t) (n + 15)/16*16 };
        res.size += count*cur.size;
        return cur;
    };

    const auto & p = plan;

    constexpr int64_t tile = LLAMA_KV_MIXED_TILE;

    // where products of matrices are in BF16 rows come in groups, of which some may be left over
    const int64_t n_rows = llama_kv_mixed_product_pad(p.n_rows);

    const int64_t n_query_form = p.gemm ? n_rows*p.ld_k/2 : (p.n_rows*(p.ld_k + 63)/64*size_query + sizeof(float) - 1)/sizeof(float);

    res.kept  = take(1, p.n_query);
    res.Q     = take(p.n_rows*p.ld_k, p.n_query);
    res.query = take(n_query_form, p.n_query);

    res.O     = take((p.gemm ? n_rows : p.n_rows)*p.ld_v, p.n_hpt);
    res.m     = take(p.n_rows, p.n_hpt);
    res.s     = take(p.n_rows*LLAMA_KV_MIXED_MAX_LANES, p.n_hpt);
    res.slope = take(p.n_gqa, p.n_hpt);
    res.m_hot = take(p.n_chunk_hot > 0 ? p.n_rows : 0, p.n_hpt);
    res.s_hot = take(p.n_chunk_hot > 0 ? p.n_rows : 0, p.n_hpt);

    res.pmax  = take(p.gemm ? 0 : 2*LLAMA_KV_MIXED_ATTN_FEW_ROWS);
    res.mean  = take(p.ld_k);
    res.S     = take(LLAMA_KV_MIXED_ATTN_ROWS*tile);
    res.mask  = take(p.n_tpb*tile);
    res.K     = take(tile*p.ld_k);
    res.KT    = take(p.gemm ? tile*p.ld_k : 0);
    res.V     = take(tile*p.ld_v);

    res.size += 16; // threads' memories keep off each other's cache lines

    return res;
}
