#pragma once

#include "llama-kv-cache.h"

#include <cstdint>
#include <vector>

//
// the mixed KV cache in llama.cpp: all that the patches call
//

struct llama_cparams;
struct llama_model;
struct llm_graph_context;

// loads backends that are plug-ins where the program has loaded none
void llama_kv_mixed_load_backends();

// Before a context is made: where it is to have a mixed cache, a quantised type of rows becomes that of cold ones, and F16 takes its
// place. Warns of variables that look like ours, once.
void llama_kv_mixed_take_params(llama_context_params & params);

// throws when a mixed cache is requested for a model whose memory can not be one
void llama_kv_mixed_check_model(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);

// passes on what create_memory() made; throws when a mixed cache was requested and there is none in it
llama_memory_i * llama_kv_mixed_check_memory(llama_memory_i * mem);

// new llama_kv_cache(), a mixed one when that is requested
llama_kv_cache * llama_kv_mixed_new_cache(
                            const llama_model & model,
                          const llama_hparams & hparams,
                                    ggml_type   type_k,
                                    ggml_type   type_v,
                                         bool   v_trans,
                                         bool   offload,
                                         bool   unified,
                                     uint32_t   kv_size,
                                     uint32_t   n_seq_max,
                                     uint32_t   n_pad,
                                     uint32_t   n_swa,
                               llama_swa_type   swa_type,
                               llama_memory_t   mem_other,
        const llama_memory_i::layer_filter_cb & filter,
        const  llama_memory_i::layer_reuse_cb & reuse,
        const  llama_memory_i::layer_share_cb & share);

// new llama_kv_cache_context() of a batch, of the cache's own kind
llama_kv_cache_context * llama_kv_mixed_new_context(
                             llama_kv_cache * kv,
            llama_kv_cache::slot_info_vec_t   sinfos,
                  std::vector<llama_ubatch>   ubatches);

// split_simple() and split_equal() of a batch of which the ubatches were split off before, see llama_kv_cache_mixed::split_simple()
llama_ubatch llama_kv_mixed_split_simple(
                             llama_kv_cache & kv,
                         llama_batch_allocr & balloc,
            const std::vector<llama_ubatch> & ubatches,
                                   uint32_t   n_ubatch);

llama_ubatch llama_kv_mixed_split_equal(
                             llama_kv_cache & kv,
                         llama_batch_allocr & balloc,
            const std::vector<llama_ubatch> & ubatches,
                                   uint32_t   n_ubatch,
                                       bool   sequential);

// the most tokens that the next ubatch may have, see llama_kv_cache_mixed::get_n_ubatch(); n_ubatch for other caches
uint32_t llama_kv_mixed_n_ubatch(
                             llama_kv_cache & kv,
                   const llama_batch_allocr & balloc,
            const std::vector<llama_ubatch> & ubatches,
                                   uint32_t   n_ubatch,
                                   uint32_t   n_tail);

// the tokens that a stream holds: all cells of another cache
uint32_t llama_kv_mixed_n_ctx_seq(const llama_kv_cache & kv);

// cold cells in view, 0 for other caches
uint32_t llama_kv_mixed_n_cold(const llama_kv_cache_context * mctx);

// the update of a part of a memory whose attention has another cache: a mixed one carries it out, see llama_kv_cache_mixed
llama_memory_context_ptr llama_kv_mixed_init_update(llama_kv_cache & kv_attn, llama_kv_cache & kv, llama_context * lctx, bool optimize);

// what init_batch() reports when prepare() found no way: that it does not fit; or, of a mixed cache, that rows and positions
// do not belong together, because the update before this has failed
llama_memory_status llama_kv_mixed_status_failed(const llama_kv_cache & kv);

// writes the state of a part of a memory beside the attention's cache, with a checksum where that is mixed
void llama_kv_mixed_state_write(
             llama_kv_cache & kv_attn,
             llama_memory_i & part,
           llama_io_write_i & io,
               llama_seq_id   seq_id,
      llama_state_seq_flags   flags);

// reads the state of one part of a memory: of the attention's cache, or of the rest of it after that
// where the attention is mixed, a failure leaves all parts as they were, see llama_kv_cache_mixed::state_read_part()
void llama_kv_mixed_state_read(
             llama_kv_cache & kv_attn,
             llama_memory_i & part,
            llama_io_read_i & io,
               llama_seq_id   seq_id,
      llama_state_seq_flags   flags);

// throws when the context is that of a mixed cache, for inputs that know K alone
void llm_refuse_mixed(const llama_kv_cache_context * mctx);

// llm_graph_context::build_attn_mha(), over cold and hot where mctx is the context of a mixed cache
// k and v are the views of its hot rows
ggml_tensor * llm_build_attn_mixed(
              const llm_graph_context & gctx,
         const llama_kv_cache_context * mctx,
                          ggml_tensor * q,
                          ggml_tensor * k,
                          ggml_tensor * v,
                          ggml_tensor * kq_b,
                          ggml_tensor * kq_mask,
                          ggml_tensor * sinks,
                          ggml_tensor * v_mla,
                                float   kq_scale,
                                  int   il);
