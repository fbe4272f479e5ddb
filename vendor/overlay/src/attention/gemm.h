// Many query rows: scores and outputs are products of matrices of floats.

#pragma once

#include "formats/tile.h"

namespace {

// C (+)= A B with M rows of A; N_VEC vectors of columns; n_in: columns of A, rows of B
template <int M, int N_VEC, bool add>
V_INLINE void gemm_block(const float * A, int64_t lda, const float * B, int64_t ldb, float * C, int64_t ldc, int64_t n_in) {
    vf acc[M][N_VEC];
KVM_UNROLL
    for (int m = 0; m < M; ++m) {
KVM_UNROLL
        for (int n = 0; n < N_VEC; ++n) {
            acc[m][n] = add ? v_load(C + m*ldc + n*V_LEN) : v_zero();
        }
    }
    for (int64_t i = 0; i < n_in; ++i) {
        KVM_STEP(B);
        vf b[N_VEC];
KVM_UNROLL
        for (int n = 0; n < N_VEC; ++n) {
            b[n] = v_load(B + i*ldb + n*V_LEN);
        }
KVM_UNROLL
        for (int m = 0; m < M; ++m) {
            const vf a = v_set(A[m*lda + i]);
KVM_UNROLL
            for (int n = 0; n < N_VEC; ++n) {
                acc[m][n] = v_fma(a, b[n], acc[m][n]);
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

template <int M, int N_VEC, bool add>
V_INLINE void gemm_rows(int64_t n_rows, const float * A, int64_t lda, const float * B, int64_t ldb, float * C, int64_t ldc, int64_t n_in) {
    int64_t r = 0;
    for (; r + M <= n_rows; r += M) {
        gemm_block<M, N_VEC, add>(A + r*lda, lda, B, ldb, C + r*ldc, ldc, n_in);
    }
    for (; r < n_rows; ++r) {
        gemm_block<1, N_VEC, add>(A + r*lda, lda, B, ldb, C + r*ldc, ldc, n_in);
    }
}

// n_cols: a multiple of BLOCK
template <bool add>
void gemm(int64_t n_rows, int64_t n_cols, int64_t n_in, const float * A, int64_t lda, const float * B, int64_t ldb, float * C, int64_t ldc) {
    constexpr int step = V_GEMM_VECS*V_LEN;
    int64_t c = 0;
    for (; c + step <= n_cols; c += step) {
        gemm_rows<V_GEMM_ROWS, V_GEMM_VECS, add>(n_rows, A, lda, B + c, ldb, C + c, ldc, n_in);
    }
    for (; c < n_cols; c += BLOCK) {
        gemm_rows<V_GEMM_ROWS, V_BLOCK < V_GEMM_VECS ? V_BLOCK : V_GEMM_VECS, add>(n_rows, A, lda, B + c, ldb, C + c, ldc, n_in);
    }
}

// dst[i][j] = src[j][i]: rows of TILE; n_embd: a multiple of 4
void transpose(const float * src, int64_t ld, int64_t n_embd, float * dst) {
    for (int j = 0; j < TILE; j += V_LEN) {
        for (int64_t i = 0; i < n_embd; i += 4) {
            vi x[4];
            v_transpose4((const uint8_t *) (src + j*ld + i), ld*sizeof(float), x);
KVM_UNROLL
            for (int p = 0; p < 4; ++p) {
                v_store(dst + (i + p)*TILE + j, v_from_bits(x[p]));
            }
        }
    }
}

} // namespace
