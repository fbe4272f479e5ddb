// Rows of V that are left unread when a token is decoded, since their weights are too small to matter.
//
// v_skip is the share of a query row's weights that may be dropped. A cell is dropped where its weight is v_skip/n of the
// row's total or less, n being the number of all cells: together they have no more than v_skip of the total, and what the
// output lacks is no longer than v_skip times the longest row of V. The total is known at the end only, but what some of the
// cells have is no more than that: the hot ones, which come first (the sinks are among them), and the task's own so far.
// Weights that are dropped stay in the sum that the output is divided by.
//
// Which rows of V are wanted is known when a tile's K has been read. They are fetched during the work on the V before, which
// is another head's, and met after the next K.

#pragma once

#include "attention/attend.h"
#include "attention/partial.h"

namespace {

// what the weights of a task's query rows sum up to over all hot cells
V_INLINE void load_hot(const attn_plan & p, const workspace & w, const partials<float> & parts, int64_t stream, int64_t block, int64_t ikv, int64_t n_rows) {
    const int64_t first = p.n_chunk - p.n_chunk_hot;

    for (int64_t r = 0; r < n_rows; ++r) {
        const float m = parts.get_max(stream, block, first, p.n_chunk, ikv, r);
        float s = 0.0f;
        for (int64_t c = first; c < p.n_chunk; ++c) {
            const auto part = parts.get(stream, block, c, ikv);
            if (part.s(r) != 0.0f) {
                s += part.s(r)*exp2_1(part.m(r) - m);
            }
        }
        w.m_hot[r] = m;
        w.s_hot[r] = s;
    }
}

// n bytes, at least 16
V_INLINE void copy_row(uint8_t * dst, const uint8_t * src, int64_t n) {
    if (n < 32) {
        memcpy(dst,          src,          16);
        memcpy(dst + n - 16, src + n - 16, 16);
        return;
    }
    for (int64_t i = 0; i + 32 <= n; i += 32) {
        memcpy(dst + i, src + i, 32);
    }
    memcpy(dst + n - 32, src + n - 32, 32);
}

// 0, 1, 2, ...
struct cell_numbers {
    int32_t v[TILE];
    constexpr cell_numbers() : v() {
        for (int i = 0; i < TILE; ++i) {
            v[i] = i;
        }
    }
};
constexpr cell_numbers all_cells;

static_assert(2*LLAMA_KV_MIXED_ATTN_FEW_ROWS <= ROWS, "there is room for the weights of two tiles");

// attend() for a task's tiles one after the other, then finish()
class skipper {
public:
    explicit skipper(const attn_args & a) : share(a.v_skip/(float) (a.seg[0].n_kv + a.seg[1].n_kv)) {}

    void operator()(const attn_args & a, const attn_plan & p, workspace w, int64_t n_rows, int64_t n_tokens, const kv_tile & kv, const mask_kind * kind) {
        if (last && last->acc.O == w.O) {
            finish(); // before the same head's output is scaled anew
        }

        // two take turns
        const int i = last == steps;
        w.S    += i*LLAMA_KV_MIXED_ATTN_FEW_ROWS*TILE;
        w.pmax += i*LLAMA_KV_MIXED_ATTN_FEW_ROWS;

        step & cur = steps[i];
        cur.acc  = weigh(a, p, w, n_rows, n_tokens, kv, kind);
        cur.meet = kv.format_v.acc;
        cur.P    = w.S;
        cur.room = (uint8_t *) w.V;
        cur.find(w, share);

        // its rows are fetched during the work on the last tile's; where there is none, at once
        tile & v = last ? last->acc.v : cur.acc.v;
        v.next        = cur.acc.v;
        v.next_list   = cur.cells;
        v.n_next_list = cur.n;
        if (last && last->n > 0) {
            finish();
        } else {
            ahead(v, 1).visit(v.n);
            v.next_list = nullptr;
            v.next      = {};
        }
        last = &cur;
    }

    void finish() {
        if (last && last->n > 0) {
            last->pack();
            last->meet(last->acc);
        }
        last = nullptr;
    }

private:
    // a tile whose K has been read
    struct step {
        llama_kv_mixed_acc acc;
        void (*meet)(const llama_kv_mixed_acc & a);

        float   * P;
        uint8_t * room; // for rows

        // Cells whose V is wanted by any query row; where these are more than three quarters, all of them.
        int      n;
        int32_t  cells[TILE];
        uint32_t bits [TILE/V_LEN];

        V_INLINE void find(const workspace & w, float share) {
            float least[LLAMA_KV_MIXED_ATTN_FEW_ROWS];
            for (int64_t r = 0; r < acc.n_rows; ++r) {
                const float above = w.m_hot[r] - w.m[r];
                least[r] = share*(v_hsum(v_load(w.s + r*V_LEN)) + w.s_hot[r]*exp2_1(above < 100.0f ? above : 100.0f));
            }

            n = 0;
            for (int j = 0; j < acc.v.n; j += V_LEN) {
                uint32_t x = 0;
                for (int64_t r = 0; r < acc.n_rows; ++r) {
                    x |= v_above(v_load(P + r*TILE + j), v_set(least[r]));
                }
                bits[j/V_LEN] = x;
                v_compress(cells + n, all_cells.v + j, x);
                n += __builtin_popcount(x);
            }
            if (n > acc.v.n*3/4) {
                n = acc.v.n;
                memcpy(cells, all_cells.v, sizeof(cells));
            }
        }

        // leaves weights and rows of V of these cells alone
        V_INLINE void pack() {
            tile & v = acc.v;
            if (n == v.n) {
                return;
            }
            for (int i = 0; i < n; ++i) {
                copy_row(room + i*v.n_bytes, v.data + cells[i]*v.nb, v.n_bytes);
            }
            for (int64_t r = 0; r < acc.n_rows; ++r) {
                float * row = P + r*TILE;
                int m = 0;
                for (int j = 0; j < v.n; j += V_LEN) {
                    v_compress(row + m, row + j, bits[j/V_LEN]);
                    m += __builtin_popcount(bits[j/V_LEN]);
                }
                memset(row + m, 0, (TILE - m)*sizeof(float));
            }
            // to a multiple of four, with weights of 0
            v.n = (n + 3)/4*4;
            for (int i = n; i < v.n; ++i) {
                copy_row(room + i*v.n_bytes, room, v.n_bytes);
            }
            v.data     = room;
            v.nb       = v.n_bytes;
            acc.masked = false;
        }
    };

    const float share;
    step   steps[2];
    step * last = nullptr;
};

} // namespace
