// Products of matrices in BF16, for many query rows, where a processor has instructions for these.

#pragma once

#include <cstddef>
#include <cstdint>

//
// Numbers are rounded to BF16, which has 8 bits of them, sums are F32. Two values that are added to one sum lie side by side in a
// word of 32 bits, the first one in the lower half. Nobody else looks at the words: Arm's have an order of their own in the same
// room, see cpu/products-neon.cpp.
//

#define LLAMA_KV_MIXED_PRODUCT_ROWS 16 // rows of Q, P, S and O come in groups of so many, padded

#define LLAMA_KV_MIXED_PRODUCT_CELLS 32 // cells that are laid out at a time

static inline int64_t llama_kv_mixed_product_pad(int64_t n_rows) {
    return (n_rows + LLAMA_KV_MIXED_PRODUCT_ROWS - 1)/LLAMA_KV_MIXED_PRODUCT_ROWS*LLAMA_KV_MIXED_PRODUCT_ROWS;
}

// ld: of rows, a multiple of 32; "cells": LLAMA_KV_MIXED_TILE; n: cells that count
struct llama_kv_mixed_products {
    // around a thread's work; state: 64 bytes that are the thread's own until end()
    void (*begin)(void * state);
    void (*end)  (void * state);

    // Q [n_rows][ld] to words [n_rows padded][ld/2], zeros behind the last row
    void (*load_q)(const float * Q, int64_t n_rows, int64_t ld, uint32_t * dst);

    // LLAMA_KV_MIXED_PRODUCT_CELLS cells from j on of K, [..][ld], to words [ld/2][cells], each of two values of a cell
    void (*load_k)(const float * K, int j, int64_t ld, uint32_t * dst);

    // as many of V, [..][ld], to words [cells/2][ld], each of two cells
    void (*load_v)(const float * V, int j, int64_t ld, uint32_t * dst);

    // P [n_rows][cells] to words [n_rows padded][cells/2] in its place, zeros behind the last row
    void (*load_p)(float * P, int64_t n_rows);

    // S [n_rows padded][cells] = Q K^T; null, as are load_q and load_k: whole numbers are faster
    void (*scores)(const uint32_t * Q, const uint32_t * K, int64_t n_rows, int64_t ld, int n, float * S);

    // O [n_rows padded][ld] += P V
    void (*outputs)(const uint32_t * P, const uint32_t * V, int64_t n_rows, int64_t ld, int n, float * O);
};
