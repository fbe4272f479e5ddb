// Where a task's cells lie.

#pragma once

#include "attention/mask.h"
#include "formats/tile.h"

namespace {

// of a segment
V_INLINE int64_t count_tiles(const attn_args & a, int i_seg) {
    return (a.seg[i_seg].n_kv + TILE - 1)/TILE;
}

// chunks that lie in the first segment as a whole
V_INLINE int64_t first_segment_chunks(const attn_args & a, const attn_plan & p) {
    return p.n_chunk_hot > 0 ? p.n_chunk - p.n_chunk_hot : count_tiles(a, 0)/p.n_tile;
}

// what a task is about
struct place {
    int64_t ikv, chunk, block, stream; // ikv: the first of its KV heads

    int64_t begin, end; // tiles, none lies in both segments; those of the second follow those of the first

    V_INLINE place(const attn_args & a, const attn_plan & p, int64_t task) {
        const bool    is_hot  = task < p.n_task_hot;
        const int64_t n_cold  = p.n_chunk - p.n_chunk_hot;
        const int64_t n_chunk = is_hot ? p.n_chunk_hot : n_cold;

        task -= is_hot ? 0 : p.n_task_hot;

        // heads next to each other read cells next to each other
        ikv    = task*p.n_hpt % a.n_head_kv;
        chunk  = task*p.n_hpt / a.n_head_kv % n_chunk;
        block  = task*p.n_hpt / a.n_head_kv / n_chunk % p.n_block;
        stream = task*p.n_hpt / a.n_head_kv / n_chunk / p.n_block;

        const int64_t n_tile_cold = count_tiles(a, 0);
        const int64_t n_tile      = n_tile_cold + count_tiles(a, 1);

        const int64_t limit = p.n_chunk_hot > 0 && !is_hot ? n_tile_cold : n_tile;

        begin = is_hot ? n_tile_cold + chunk : chunk*p.n_tile;
        end   = is_hot ? begin + 1 : begin + p.n_tile < limit ? begin + p.n_tile : limit;

        chunk += is_hot ? n_cold : 0;
    }
};

// the rows of a task's tiles, and those that are fetched ahead
struct tile_rows {
    const attn_args & a;
    const attn_plan & p;

    const place here;
    const place after; // the thread's next task
    const bool  is_last; // there is none

    const int64_t n_tile_cold;

    V_INLINE tile_rows(const attn_args & a, const attn_plan & p, int64_t task, int64_t task_next) :
        a(a), p(p), here(a, p, task), after(a, p, task_next), is_last(task_next >= p.n_task), n_tile_cold(count_tiles(a, 0)) {}

    V_INLINE int get_segment(int64_t it) const {
        return it >= n_tile_cold;
    }

    // a tile's first cell, counted within its segment
    V_INLINE int64_t get_cell(int64_t it) const {
        return (it - (get_segment(it) ? n_tile_cold : 0))*TILE;
    }

    // rows of a KV head
    V_INLINE rows get(int64_t it, int64_t ikv, int64_t stream, bool is_v) const {
        const int i = get_segment(it);
        const auto & seg = a.seg[i];
        const size_t * nb = is_v ? seg.nb_v : seg.nb_k;
        return { (const uint8_t *) (is_v ? seg.v : seg.k) + ikv*nb[0] + get_cell(it)*nb[1] + stream*nb[2], nb[1], (int64_t) p.row_size[i][is_v] };
    }

    // What is fetched while head h of a tile is worked on: the head's rows of the next tile. Where a task has all heads, whose
    // rows lie side by side, it is an equal part of all these rows instead: they share cache lines.
    V_INLINE rows get_next(int64_t it, int64_t h, bool is_v) const {
        const bool ends = it + 1 == here.end;
        if (ends && is_last) {
            return {};
        }
        const place & at = ends ? after : here;
        const int64_t t  = ends ? after.begin : it + 1;

        rows res = get(t, at.ikv + h, at.stream, is_v);

        const auto & seg = a.seg[get_segment(t)];
        const size_t nb_head = (is_v ? seg.nb_v : seg.nb_k)[0];
        if (p.n_hpt == a.n_head_kv && nb_head*p.n_hpt <= res.nb) {
            res.nb      = (res.nb + p.n_hpt - 1)/p.n_hpt;
            res.data   += h*(TILE*res.nb - nb_head);
            res.n_bytes = res.nb;
        }
        return res;
    }
};

} // namespace
