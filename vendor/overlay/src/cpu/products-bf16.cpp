#if defined(LLAMA_KV_MIXED_BF16)

#define KVM_AVX512
#include "attention/bf16.h"

// C += A B with M rows of A, words of two values each; N_VEC vectors of columns; n_in: words of a row of A, rows of B
template <int M, int N_VEC>
static V_INLINE void block(const uint32_t * A, int64_t lda, const uint32_t * B, int64_t ldb, float * C, int64_t ldc, int64_t n_in) {
    vf acc[M][N_VEC];
KVM_UNROLL
    for (int m = 0; m < M; ++m) {
KVM_UNROLL
        for (int n = 0; n < N_VEC; ++n) {
            acc[m][n] = v_load(C + m*ldc + n*V_LEN);
        }
    }
    for (int64_t i = 0; i < n_in; ++i) {
        vi b[N_VEC];
KVM_UNROLL
        for (int n = 0; n < N_VEC; ++n) {
            b[n] = v_iload(B + i*ldb + n*V_LEN);
        }
KVM_UNROLL
        for (int m = 0; m < M; ++m) {
            const vi a = v_iset((int32_t) A[m*lda + i]);
KVM_UNROLL
            for (int n = 0; n < N_VEC; ++n) {
                acc[m][n] = _mm512_dpbf16_ps(acc[m][n], (__m512bh) a, (__m512bh) b[n]);
            }
        }
    }
KVM_UNROLL
    for (int m = 0; m < M; ++m) {
KVM_UNROLL
        for (int n = 0; n < N_VEC; ++n) {
            v_store(C + m*ldc + n*V_LEN, acc[m][n]);
        }
    }
}

static void outputs(const uint32_t * P, const uint32_t * V, int64_t n_rows, int64_t ld, int n, float * O) {
    const auto columns = [&](auto n_vec, int64_t c) {
        constexpr int N = decltype(n_vec)::value;
        int64_t r = 0;
        for (; r + V_GEMM_ROWS <= n_rows; r += V_GEMM_ROWS) {
            block<V_GEMM_ROWS, N>(P + r*TILE/2, TILE/2, V + c, ld, O + r*ld + c, ld, (n + 1)/2);
        }
        for (; r < n_rows; ++r) {
            block<1, N>(P + r*TILE/2, TILE/2, V + c, ld, O + r*ld + c, ld, (n + 1)/2);
        }
    };
    int64_t c = 0;
    for (; c + 4*V_LEN <= ld; c += 4*V_LEN) {
        columns(number<4>(), c);
    }
    for (; c < ld; c += 2*V_LEN) {
        columns(number<2>(), c);
    }
}

static void nothing(void *) {}

extern const llama_kv_mixed_products llama_kv_mixed_products_bf16;

const llama_kv_mixed_products llama_kv_mixed_products_bf16 = {
    nothing, nothing, nullptr, nullptr, load_v_bf16, load_p_bf16, nullptr, outputs,
};

#endif
