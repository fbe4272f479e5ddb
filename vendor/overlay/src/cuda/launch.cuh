#pragma once

#include "common.cuh"
#include "params.cuh"

//
// launches for heads of D values: each size is compiled in a file of its own
//

// p.seg's splits, p.parts and p.meta are set here
template <int D>
void kv_launch_attend(ggml_backend_cuda_context & ctx, kv_mixed_attend & p, int n_stream);

// bytes of shared memory that a block takes for formats and tokens as in p
template <int D>
int kv_get_shared(const kv_mixed_attend & p);

template <int D>
void kv_launch_join(ggml_backend_cuda_context & ctx, const kv_mixed_join & p, int n_stream, bool is_cold);

// n_blocks: of kv_get_move_blocks(); is_mean: makes means, in place of moving rows
void kv_launch_move(ggml_backend_cuda_context & ctx, const kv_mixed_move & p, int n_blocks, bool is_mean);
