#if defined(LLAMA_KV_MIXED_NEON_BF16)

#define KVM_NEON
#include "attention/products.h"
#include "formats/tile.h"

// BFMMLA adds to four sums, two rows by two columns, the products of four values of each: those of both rows lie side by side,
// and so do those of both columns. Here these are two query rows, or elements, and four cells.

static V_INLINE void store_words(void * dst, vf a, vf b) {
    v_istore(dst, vreinterpretq_u8_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(a), b)));
}

static V_INLINE bfloat16x8_t load_words(const void * src) { return vreinterpretq_bf16_u8(v_iload(src)); }

// P: [n_rows/2][cells/4] of two rows of four cells
static void load_p(float * P, int64_t n_rows) {
    const int64_t n_padded = llama_kv_mixed_product_pad(n_rows);
    for (int64_t r = 0; r < n_padded; r += 2) {
        float * dst = P + r*TILE/2;
        for (int j = 0; j < TILE; j += 4) {
            const vf a = r     < n_rows ? v_load(P + r*TILE + j)       : v_zero();
            const vf b = r + 1 < n_rows ? v_load(P + (r + 1)*TILE + j) : v_zero();
            store_words(dst + j, a, b);
        }
    }
}

// V: of every four cells, elements (0, 1), (4, 5), ..., then (2, 3), (6, 7), ...
static void load_v(const float * V, int j, int64_t ld, uint32_t * dst) {
    dst += j/2*ld;
    for (int k = 0; k < LLAMA_KV_MIXED_PRODUCT_CELLS; k += 4, V += 4*ld, dst += 2*ld) {
        for (int64_t i = 0; i < ld; i += 4) {
            vi x[4];
            v_transpose4((const uint8_t *) (V + i), ld*sizeof(float), x);
            store_words(dst + i,      v_from_bits(x[0]), v_from_bits(x[1]));
            store_words(dst + ld + i, v_from_bits(x[2]), v_from_bits(x[3]));
        }
    }
}

// O += P V with 2*M rows from P on and 4*N elements from V on
template <int M, int N>
static V_INLINE void block(const uint32_t * P, const uint32_t * V, int64_t ld, int n, float * O) {
    vf acc[M][2*N];
KVM_UNROLL
    for (int m = 0; m < M; ++m) {
KVM_UNROLL
        for (int k = 0; k < N; ++k) {
            const vf a = v_load(O + 2*m*ld + 4*k);
            const vf b = v_load(O + (2*m + 1)*ld + 4*k);
            acc[m][2*k]     = vcombine_f32(vget_low_f32(a),  vget_low_f32(b));
            acc[m][2*k + 1] = vcombine_f32(vget_high_f32(a), vget_high_f32(b));
        }
    }
    for (int j = 0; j < n; j += 4) {
        bfloat16x8_t v[2*N];
KVM_UNROLL
        for (int k = 0; k < N; ++k) {
            v[2*k]     = load_words(V + j/2*ld + 4*k);
            v[2*k + 1] = load_words(V + (j/2 + 1)*ld + 4*k);
        }
KVM_UNROLL
        for (int m = 0; m < M; ++m) {
            const bfloat16x8_t p = load_words(P + m*TILE + j);
KVM_UNROLL
            for (int k = 0; k < 2*N; ++k) {
                acc[m][k] = vbfmmlaq_f32(acc[m][k], p, v[k]);
            }
        }
    }
KVM_UNROLL
    for (int m = 0; m < M; ++m) {
KVM_UNROLL
        for (int k = 0; k < N; ++k) {
            v_store(O + 2*m*ld + 4*k,       vcombine_f32(vget_low_f32(acc[m][2*k]),  vget_low_f32(acc[m][2*k + 1])));
            v_store(O + (2*m + 1)*ld + 4*k, vcombine_f32(vget_high_f32(acc[m][2*k]), vget_high_f32(acc[m][2*k + 1])));
        }
    }
}

static void outputs(const uint32_t * P, const uint32_t * V, int64_t n_rows, int64_t ld, int n, float * O) {
    // rows are padded to as many
    static_assert(LLAMA_KV_MIXED_PRODUCT_ROWS % 8 == 0);
    for (int64_t r = 0; r < n_rows; r += 8) {
        for (int64_t i = 0; i < ld; i += 8) {
            block<4, 2>(P + r*TILE/2, V + i, ld, n, O + r*ld + i);
        }
    }
}

static void nothing(void *) {}

extern const llama_kv_mixed_products llama_kv_mixed_products_neon;

const llama_kv_mixed_products llama_kv_mixed_products_neon = {
    nothing, nothing, nullptr, nullptr, load_v, load_p, nullptr, outputs,
};

#endif
