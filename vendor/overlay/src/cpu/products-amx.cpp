#if defined(LLAMA_KV_MIXED_AMX)

#define KVM_AVX512
#include "attention/bf16.h"

#include <type_traits>

// Eight tiles of 16 rows of 64 bytes: four sums (0 to 3), two of rows (4, 5) and two of columns (6, 7).

static void begin(void * state) {
    struct {
        uint8_t  palette = 1;
        uint8_t  start_row = 0;
        uint8_t  reserved[14] = {};
        uint16_t row_bytes[16] = { 64, 64, 64, 64, 64, 64, 64, 64 };
        uint8_t  rows     [16] = { 16, 16, 16, 16, 16, 16, 16, 16 };
    } config;
    static_assert(sizeof(config) == 64, "what the instruction reads");

    // others in this thread may have tiles of their own
    _tile_storeconfig(state);

    // GCC does not know that the instruction reads all of it
    const void * address = &config;
    __asm__ volatile("" : "+r"(address) : : "memory");
    _tile_loadconfig(address);
}

static void end(void * state) {
    _tile_loadconfig(state);
}

// sums += A B over n_in words; A: rows of lda words, up to two tiles of them; B: rows of ldb words, two tiles of columns
template <bool two>
static void add_products(const uint32_t * A, int64_t lda, const uint32_t * B, int64_t ldb, int64_t n_in) {
    const size_t nb_a = lda*sizeof(uint32_t);
    const size_t nb_b = ldb*sizeof(uint32_t);

    for (int64_t k = 0; k < n_in; k += 16) {
        _tile_loadd(4, A + k,          nb_a);
        _tile_loadd(6, B + k*ldb,      nb_b);
        _tile_loadd(7, B + k*ldb + 16, nb_b);
        if (two) {
            _tile_loadd(5, A + k + 16*lda, nb_a);
        }
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

template <bool two>
static void store_sums(float * dst, int64_t ld) {
    const size_t nb = ld*sizeof(float);
    _tile_stored(0, dst,      nb);
    _tile_stored(1, dst + 16, nb);
    if (two) {
        _tile_stored(2, dst + 16*ld,      nb);
        _tile_stored(3, dst + 16*ld + 16, nb);
    }
}

template <bool two>
static void scores_of(const uint32_t * Q, const uint32_t * K, int64_t ld, int n, float * S) {
    for (int c = 0; c < n; c += 32) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        add_products<two>(Q, ld/2, K + c, TILE, ld/2);
        store_sums<two>(S + c, TILE);
    }
}

template <bool two>
static void outputs_of(const uint32_t * P, const uint32_t * V, int64_t ld, int n, float * O) {
    const size_t nb = ld*sizeof(float);
    for (int64_t c = 0; c < ld; c += 32) {
        _tile_loadd(0, O + c,      nb);
        _tile_loadd(1, O + c + 16, nb);
        if (two) {
            _tile_loadd(2, O + 16*ld + c,      nb);
            _tile_loadd(3, O + 16*ld + c + 16, nb);
        }
        add_products<two>(P, TILE/2, V + c, ld, (n + 31)/32*16);
        store_sums<two>(O + c, ld);
    }
}

// f(whether these are two tiles of rows, the first of them)
template <class F>
static void each_rows(int64_t n_rows, const F & f) {
    int64_t r = 0;
    for (; r + 16 < n_rows; r += 32) {
        f(std::true_type(), r);
    }
    if (r < n_rows) {
        f(std::false_type(), r);
    }
}

static void scores(const uint32_t * Q, const uint32_t * K, int64_t n_rows, int64_t ld, int n, float * S) {
    each_rows(n_rows, [&](auto two, int64_t r) { scores_of<two.value>(Q + r*ld/2, K, ld, n, S + r*TILE); });
}

static void outputs(const uint32_t * P, const uint32_t * V, int64_t n_rows, int64_t ld, int n, float * O) {
    each_rows(n_rows, [&](auto two, int64_t r) { outputs_of<two.value>(P + r*TILE/2, V, ld, n, O + r*ld); });
}

extern const llama_kv_mixed_products llama_kv_mixed_products_amx;

const llama_kv_mixed_products llama_kv_mixed_products_amx = {
    begin, end, load_q_bf16, load_k_bf16, load_v_bf16, load_p_bf16, scores, outputs,
};

#endif
