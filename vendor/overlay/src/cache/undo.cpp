#include "cache/undo.h"

#include "cache/state-io.h"

#include <algorithm>
#include <set>

void llama_kv_cache_mixed::undo::add(ggml_tensor * t, size_t offset, size_t size) {
    saved.push_back({ t, offset, std::vector<uint8_t>(size) });

    ggml_backend_tensor_get(t, saved.back().data.data(), offset, size);
}

void llama_kv_cache_mixed::undo::add(llama_kv_cache & kv, llama_seq_id seq_id, bool all_movable) {
    const uint32_t s0 = seq_id == -1 ? 0                   : kv.get_stream(seq_id);
    const uint32_t s1 = seq_id == -1 ? kv.get_n_stream() - 1 : s0;

    for (uint32_t s = s0; s <= s1; ++s) {
        const auto & cur = kv.v_cells[s];

        std::vector<uint32_t> idxs;

        for (uint32_t i = 0; i < cur.size(); ++i) {
            if (!cur.is_empty(i) && (seq_id == -1 || all_movable || cur.seq_has(i, seq_id))) {
                idxs.push_back(i);
            }
        }

        for (const auto & layer : kv.layers) {
            ggml_tensor * k = layer.k_stream[s];
            ggml_tensor * v = layer.v_stream[s];

            for_each_run(idxs, [&](uint32_t first, size_t n) { add(k, first*k->nb[1], n*k->nb[1]); });

            if (!v || idxs.empty()) {
                continue;
            }

            if (kv.v_trans) {
                add(v, 0, ggml_nbytes(v)); // a cell is a column
            } else {
                for_each_run(idxs, [&](uint32_t first, size_t n) { add(v, first*v->nb[1], n*v->nb[1]); });
            }
        }

        cells.push_back([&kv, s, cur, head = kv.v_heads[s]] {
            kv.v_cells[s] = cur;
            kv.v_heads[s] = head;
        });
    }
}

void llama_kv_cache_mixed::undo::add(llama_memory_recurrent & mem, llama_seq_id seq_id) {
    std::set<uint32_t> idxs;

    for (uint32_t i = 0; i < mem.size; ++i) {
        const auto & cell = mem.cells[i];

        if (!cell.is_empty() && (seq_id == -1 || cell.has_seq_id(seq_id))) {
            idxs.insert(i);
            if (cell.src >= 0) {
                idxs.insert(cell.src);
            }
        }
    }

    for (const auto * ts : { &mem.r_l, &mem.s_l, &mem.p_l }) {
        for (ggml_tensor * t : *ts) {
            for (const uint32_t i : idxs) {
                if (t) {
                    add(t, i*t->nb[1], t->nb[1]);
                }
            }
        }
    }

    cells.push_back([&mem, cells = mem.cells, head = mem.head, used = mem.used, rs_idx = mem.rs_idx, n = mem.n, rs_z = mem.rs_z] {
        mem.cells  = cells;
        mem.head   = head;
        mem.used   = used;
        mem.rs_idx = rs_idx;
        mem.n      = n;
        mem.rs_z   = rs_z;
    });
}

void llama_kv_cache_mixed::undo::add(const llama_kv_mixed_means & means, const llama_kv_cache & cold, llama_seq_id seq_id) {
    for (uint32_t s = 0; s < cold.get_n_stream(); ++s) {
        const auto & cur = cold.v_cells[s];

        std::vector<uint32_t> idxs;

        for (uint32_t i = 0; i < cur.size(); ++i) {
            if (!cur.is_empty(i) && (seq_id == -1 || cur.seq_has(i, seq_id))) {
                idxs.push_back(i);
            }
        }

        for (const uint32_t page : llama_kv_mixed_means::get_pages(idxs)) {
            for (size_t il = 0; il < cold.layers.size(); ++il) {
                add(means.get(il), means.get_offset(il, s, page), means.get_size(il));
            }
        }
    }
}

void llama_kv_cache_mixed::undo::restore() const {
    for (const auto & r : saved) {
        ggml_backend_tensor_set(r.t, r.data.data(), r.offset, r.data.size());
    }

    for (const auto & f : cells) {
        f();
    }
}
