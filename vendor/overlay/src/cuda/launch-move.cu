#include "launch.cuh"
#include "move.cuh"

template <int N, int F>
static void launch_move(cudaStream_t stream, const kv_mixed_move & p) {
    const dim3 blocks(p.n, kv_move_n_block<N>(p.n_embd));

    ggml_cuda_kernel_launch(kv_move<N, F>, ggml_cuda_kernel_launch_params(blocks, dim3(32*KV_MOVE_WARPS), 0, stream), p);
}

template <int N>
static void launch_mean(cudaStream_t stream, const kv_mixed_move & p) {
    const dim3 blocks(p.n_to, p.n_embd/(32*N));

    ggml_cuda_kernel_launch(kv_mean<N>, ggml_cuda_kernel_launch_params(blocks, dim3(32*KV_MOVE_WARPS), 0, stream), p);
}

template <int N>
static void launch(cudaStream_t stream, const kv_mixed_move & p, bool is_mean) {
    if (is_mean) {
        launch_mean<N>(stream, p);
    } else if (p.format_to == KV_Q4_0) {
        launch_move<N, KV_Q4_0>(stream, p);
    } else if (p.format_to == KV_Q5_0) {
        launch_move<N, KV_Q5_0>(stream, p);
    } else if (p.format_to == KV_Q8_0) {
        launch_move<N, KV_Q8_0>(stream, p);
    } else {
        launch_move<N, KV_IQ4_NL>(stream, p);
    }
    CUDA_CHECK(cudaGetLastError());
}

void kv_launch_move(ggml_backend_cuda_context & ctx, const kv_mixed_move & p, int n_blocks, bool is_mean) {
    switch (n_blocks) {
        case 1: launch<1>(ctx.stream(), p, is_mean); break;
        case 2: launch<2>(ctx.stream(), p, is_mean); break;
        case 4: launch<4>(ctx.stream(), p, is_mean); break;
        case 8: launch<8>(ctx.stream(), p, is_mean); break;
    }
}
