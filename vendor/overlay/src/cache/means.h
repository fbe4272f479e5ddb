#pragma once

#include "formats/format.h"

#include "llama-kv-cache.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <map>
#include <vector>

//
// llama_kv_mixed_means
//
// The means of K in the pages of a cold cache: aligned groups of LLAMA_KV_MIXED_PAGE cells. The rows of a page are stored less
// its mean, which takes out what K has in common there and leaves less to quantise (KIVI, Liu et al. 2024, finds large
// values of K in fixed channels; in the basis of rotated rows they are spread, and a mean has them still).
//
// The rows that are the first to come to an empty page make its mean, and it stays as long as the page has tokens: rows that
// come later are stored less that mean too, whatever their own is. Which pages are empty is what the cells say.
//

class llama_kv_mixed_means {
public:
    // memory beside the K of each layer of cold, all zero; no_alloc: none, the model is only being measured
    // throws std::runtime_error when there is not enough
    llama_kv_mixed_means(const llama_kv_cache & cold, const std::vector<ggml_tensor *> & k, bool no_alloc);

    static uint32_t page_of(uint32_t cell) { return cell/LLAMA_KV_MIXED_PAGE; }

    // pages per stream
    uint32_t get_n_page() const { return n_page; }

    // F16 [n_embd_k_gqa, n_page, n_stream] of the i-th layer
    ggml_tensor * get(size_t i_layer) const { return layers[i_layer]; }

    // bytes of a page's mean in the i-th layer
    size_t get_size(size_t i_layer) const { return layers[i_layer]->nb[1]; }

    // where the mean of a page of a stream is in get()
    size_t get_offset(size_t i_layer, uint32_t strm, uint32_t page) const {
        return strm*layers[i_layer]->nb[2] + page*layers[i_layer]->nb[1];
    }

    // the pages of cells, ascending
    static std::vector<uint32_t> get_pages(const std::vector<uint32_t> & cells);

    // all means of a stream go to another one
    void copy_stream(uint32_t src, uint32_t dst);

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const;

private:
    uint32_t n_page;

    std::vector<ggml_tensor *> layers;

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
};

// Rows of K from the begin of a page on, F32 [n_embd, n, n_stream], with the means of their pages, [n_embd, n_page, n_stream],
// added or subtracted
ggml_tensor * llama_kv_mixed_add_means(ggml_context * ctx, ggml_tensor * rows, ggml_tensor * means);
ggml_tensor * llama_kv_mixed_sub_means(ggml_context * ctx, ggml_tensor * rows, ggml_tensor * means);
