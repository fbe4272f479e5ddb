// the saved state of a mixed KV cache: its cells and rows are put in place

#include "cache/kv-cache-mixed.h"
#include "cache/overflow.h"
#include "cache/state-io.h"
#include "cache/state.h"
#include "formats/formats.h"

#include "llama-impl.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <set>
#include <stdexcept>

std::vector<uint32_t> llama_kv_cache_mixed::state_oldest(llama_seq_id seq_id, const std::vector<state_cell> & cells, uint32_t n) const {
    if (n == 0) {
        return {};
    }

    const auto newest = std::max_element(cells.begin(), cells.end(), [](const auto & a, const auto & b) {
        return a.pos < b.pos;
    });

    std::vector<llama_kv_mixed_cand> cands;

    for (uint32_t i = 0; i < cells.size(); ++i) {
        cands.push_back({ i, cells[i].pos, newest->pos - cells[i].pos, { seq_id } });
    }

    auto movable = policy.without_pinned(cands);

    // sinks are the last to go, and the first of them last of all
    std::vector<bool> is_movable(cells.size(), false);
    for (const auto & cand : movable) {
        is_movable[cand.cell] = true;
    }

    cands.erase(std::remove_if(cands.begin(), cands.end(), [&](const auto & cand) { return is_movable[cand.cell]; }), cands.end());

    auto       res    = llama_kv_mixed_policy::select(std::move(movable), n);
    const auto pinned = llama_kv_mixed_policy::select(std::move(cands), cells.size());

    res.insert(res.end(), pinned.rbegin(), pinned.rbegin() + (n - res.size()));

    std::sort(res.begin(), res.end());

    return res;
}

std::vector<uint32_t> llama_kv_cache_mixed::state_make_room(
                         llama_seq_id   seq_id,
        const std::vector<state_cell> & hot,
                             uint32_t   n_cold,
                                 bool   on_device) {
    const uint32_t strm  = get_stream(seq_id);
    const uint32_t n_hot = hot.size();

    // as if the sequence were gone already
    llama_kv_mixed_plan plan = get_plan(strm, seq_id);

    bool fits = n_cold <= plan.cold_size - plan.cold_used;

    plan.cold_used += std::min(n_cold, plan.cold_size - plan.cold_used);

    // what is still too much when the others have made way
    const uint32_t n_over    = n_hot - std::min(n_hot, plan.room(policy));
    const uint32_t n_movable = plan.hot_used - plan.n_pinned(policy);

    if (n_over > 0) {
        // (rows that were left on the device come when all is done)
        fits = fits && !on_device && n_movable + n_over <= plan.cold_size - plan.cold_used;
    }

    if (!fits) {
        throw std::runtime_error(format("no room for the %u hot and %u cold tokens of the state: %s",
            n_hot, n_cold, describe_use().c_str()));
    }

    seq_rm(seq_id, -1, -1);

    const auto & cells_hot  = kv_hot ->v_cells[strm];
    const auto & cells_cold = kv_cold->v_cells[strm];

    // the others make way, and leave what the state needs in cold
    while (cells_hot.size() - cells_hot.get_used() < n_hot - n_over) {
        const uint32_t n_free = cells_cold.size() - cells_cold.get_used() - n_cold - n_over;

        const bool moved = move_tokens_to_cold_cache(strm, n_free, LLAMA_KV_MIXED_TRIGGER_ROOM) > 0;

        // their rows have gone before others take the cells
        synchronize();

        if (!moved) {
            throw std::runtime_error("no room for the hot tokens of the state: the others can not be moved to cold");
        }
    }

    return state_oldest(seq_id, hot, n_over);
}

// to the cells that they had, or to the first free ones; those at out, ascending, to none
llama_kv_cache_mixed::state_places llama_kv_cache_mixed::state_find_cells(
        const llama_kv_cells & cells, const std::vector<state_cell> & wanted, const std::vector<uint32_t> & out) {
    state_places res;

    res.idxs.assign(wanted.size(), state_places::NONE);

    std::vector<uint32_t> in;
    for (uint32_t i = 0; i < wanted.size(); ++i) {
        if (!std::binary_search(out.begin(), out.end(), i)) {
            in.push_back(i);
        }
    }

    const bool same = std::all_of(in.begin(), in.end(), [&](uint32_t i) {
        return wanted[i].i < cells.size() && cells.is_empty(wanted[i].i);
    });

    uint32_t i_free = 0;

    for (const uint32_t i : in) {
        i_free = same ? wanted[i].i : i_free;
        while (!cells.is_empty(i_free)) {
            i_free++;
        }
        res.idxs[i] = i_free++;
    }

    return res;
}

llama_kv_cache_mixed::state_places llama_kv_cache_mixed::state_find_pages(const state_stream & stream, uint32_t strm) const {
    const auto & cells = kv_cold->v_cells[strm];

    state_places res;

    std::map<uint32_t, std::vector<uint32_t>> offsets; // of the cells in their page
    for (const auto & cell : stream.cells) {
        offsets[llama_kv_mixed_means::page_of(cell.i)].push_back(cell.i % LLAMA_KV_MIXED_PAGE);
    }

    const auto has_room = [&](uint32_t page, const std::vector<uint32_t> & offs) {
        return std::all_of(offs.begin(), offs.end(), [&](uint32_t off) {
            const uint64_t i = (uint64_t) page*LLAMA_KV_MIXED_PAGE + off;
            return i < cells.size() && cells.is_empty(i);
        });
    };

    const auto has_means = [&](uint32_t page, const std::vector<std::vector<uint8_t>> & wanted) {
        std::vector<uint8_t> buf;
        for (size_t i = 0; i < wanted.size(); ++i) {
            buf.resize(wanted[i].size());
            ggml_backend_tensor_get(means->get(i), buf.data(), means->get_offset(i, strm, page), buf.size());
            if (buf != wanted[i]) {
                return false;
            }
        }
        return true;
    };

    // the pages that take those of the state: rows that keep their mean stay bit for bit
    std::map<uint32_t, uint32_t> taken; // by page of the state
    std::set<uint32_t> used;

    const auto take = [&](uint32_t from, uint32_t page) {
        const bool is_empty = page < means->get_n_page() && is_page_empty(strm, page);

        if (used.count(page) || !has_room(page, offsets[from]) || !(is_empty || has_means(page, stream.means.at(from)))) {
            return false;
        }

        taken[from] = page;
        used.insert(page);
        if (is_empty) {
            res.pages[page] = from;
        }
        return true;
    };

    for (const auto & [from, offs] : offsets) {
        take(from, from);
    }
    for (const auto & [from, offs] : offsets) {
        for (uint32_t page = 0; page < means->get_n_page() && !taken.count(from); ++page) {
            if (is_page_empty(strm, page)) {
                take(from, page);
            }
        }
    }

    for (const auto & cell : stream.cells) {
        const auto it = taken.find(llama_kv_mixed_means::page_of(cell.i));
        res.idxs.push_back(it == taken.end() ? state_places::NONE : it->second*LLAMA_KV_MIXED_PAGE + cell.i % LLAMA_KV_MIXED_PAGE);
    }

    return res;
}

void llama_kv_cache_mixed::state_apply(state_reader & in, const state_tier * tiers, llama_seq_id seq_id, bool on_device) {
    const uint32_t s0 = seq_id == -1 ? 0 : get_stream(seq_id);

    // hot cells of the state for which there is no room in hot, ascending
    std::vector<uint32_t> over;

    if (seq_id != -1) {
        over = state_make_room(seq_id, tiers[0].streams[0].cells, tiers[1].streams[0].cells.size(), on_device);
    } else {
        for (llama_kv_cache * kv : { get_hot(), get_cold() }) {
            kv->llama_kv_cache::clear(true);
        }
    }

    std::vector<state_places> places; // of hot, then cold, by stream

    for (size_t i = 0; i < tiers[0].streams.size(); ++i) {
        places.push_back(state_find_cells(kv_hot->v_cells[s0 + i], tiers[0].streams[i].cells, over));
    }
    for (size_t i = 0; i < tiers[1].streams.size(); ++i) {
        const auto & stream = tiers[1].streams[i];

        places.push_back(means ? state_find_pages(stream, s0 + i) : state_find_cells(kv_cold->v_cells[s0 + i], stream.cells, {}));
    }

    // rows that go to cold as hot ones do
    const size_t n_staged = std::accumulate(places.begin(), places.end(), size_t(0), [](size_t n, const state_places & p) {
        return n + std::count(p.idxs.begin(), p.idxs.end(), state_places::NONE);
    });

    if (n_staged > 0 && on_device) {
        throw std::runtime_error("the rows that were left on the device need whole pages of cold that are free, and there are not as many");
    }

    std::optional<llama_kv_mixed_overflow> overflow;
    if (n_staged > 0) {
        overflow.emplace(pairs, n_staged);
    }

    std::vector<slot_info> slots; // as places

    for (const bool is_cold : { false, true }) {
        llama_kv_cache & kv = is_cold ? *get_cold() : *get_hot();

        for (size_t i = 0; i < tiers[is_cold].streams.size(); ++i) {
            const auto & stream = tiers[is_cold].streams[i];
            const auto & place  = places[slots.size()];

            auto & cells = kv.v_cells[s0 + i];

            // all goes on bit for bit as it would have where the state is from, as long as nothing else is in the way
            if (cells.get_used() == 0) {
                kv.v_heads[s0 + i] = std::min(stream.head, cells.size());
            }

            slot_info sinfo;
            sinfo.s0 = s0 + i;
            sinfo.s1 = s0 + i;
            sinfo.resize(1);
            sinfo.strm[0] = s0 + i;

            for (size_t j = 0; j < stream.cells.size(); ++j) {
                if (place.idxs[j] != state_places::NONE) {
                    const auto & cell = stream.cells[j];

                    set_cell(cells, place.idxs[j], cell.pos, cell.shift, cell.ext, cell.seqs);
                    sinfo.idxs[0].push_back(place.idxs[j]);
                }
            }

            for (const auto & [page, from] : place.pages) {
                const auto & mean = stream.means.at(from);
                for (size_t il = 0; il < mean.size(); ++il) {
                    ggml_backend_tensor_set(means->get(il), mean[il].data(), means->get_offset(il, s0 + i, page), mean[il].size());
                }
            }

            slots.push_back(sinfo);
        }
    }

    const llama_kv_mixed_moves moves = state_place_staged(tiers, places, s0, slots);

    try {
        state_read_rows(in, tiers, places, s0, overflow ? &*overflow : nullptr, on_device);

        in.end();

        if (overflow && !overflow->move(moves, get_n_threads())) {
            throw std::runtime_error("the tokens of the state that hot has no room for can not be moved to cold");
        }
    } catch (...) {
        // half a state is none, and rows that are no numbers would be seen even in free cells
        size_t i_slot = 0;

        for (const bool is_cold : { false, true }) {
            for (size_t i = 0; i < tiers[is_cold].streams.size(); ++i) {
                const auto & sinfo = slots[i_slot++];

                llama_kv_cache & kv = is_cold ? *get_cold() : *get_hot();

                kv.llama_kv_cache::state_clear(seq_id, sinfo.strm[0], sinfo);
            }
        }

        throw;
    }
}

llama_kv_mixed_moves llama_kv_cache_mixed::state_place_staged(
        const state_tier * tiers, const std::vector<state_places> & places, uint32_t s0, std::vector<slot_info> & slots) {
    const size_t n_stream_state = tiers[0].streams.size();

    llama_kv_mixed_moves res;

    // the staged rows of a stream of the state follow each other: those of hot, then those of cold
    uint32_t i_staged = 0;

    for (const bool is_cold : { false, true }) {
        for (size_t i = 0; i < n_stream_state; ++i) {
            const auto & stream = tiers [is_cold].streams[i];
            const auto & place  = places[is_cold*n_stream_state + i];

            std::vector<uint32_t> src;
            std::vector<const state_cell *> staged;

            for (size_t j = 0; j < stream.cells.size(); ++j) {
                if (place.idxs[j] == state_places::NONE) {
                    src.push_back(i_staged++);
                    staged.push_back(&stream.cells[j]);
                }
            }

            const auto dst = get_free_cold(s0 + i, src.size());

            res.append(get_moves(src, s0 + i, dst));

            for (size_t j = 0; j < staged.size(); ++j) {
                set_cell(kv_cold->v_cells[s0 + i], dst[j], staged[j]->pos, staged[j]->shift, staged[j]->ext, staged[j]->seqs);
            }

            auto & idxs = slots[n_stream_state + i].idxs[0];
            idxs.insert(idxs.end(), dst.begin(), dst.end());
        }
    }

    return res;
}

void llama_kv_cache_mixed::state_read_rows(
        state_reader & in, const state_tier * tiers, const std::vector<state_places> & places, uint32_t s0, llama_kv_mixed_overflow * overflow, bool on_device) {
    const size_t n_stream_state = tiers[0].streams.size();

    std::vector<uint8_t> buf;
    std::vector<float>   row;

    const auto read_rows = [&](ggml_tensor * t, uint32_t first, size_t n) {
        const size_t size_row = t->nb[1];

        if (on_device) {
            in.io.read_tensor(as_bytes(t), first*size_row, n*size_row);
            return;
        }

        buf.resize(n*size_row);
        in.get(buf.data(), buf.size());
        ggml_backend_tensor_set(t, buf.data(), first*size_row, buf.size());
    };

    // a row of cold as it was in hot
    const auto read_back = [&](const ggml_tensor * cold, const uint8_t * mean, int64_t n_rot, ggml_tensor * t, uint32_t i) {
        const int64_t n = cold->ne[0];

        buf.resize(cold->nb[1]);
        row.resize(n);
        in.get(buf.data(), buf.size());
        llama_kv_mixed_restore_row(*llama_kv_mixed_find_format(cold->type), buf.data(), mean, n, n_rot, row.data());

        buf.resize(t->nb[1]);
        if (t->type == GGML_TYPE_F32) {
            memcpy(buf.data(), row.data(), buf.size());
        } else {
            ggml_get_type_traits(t->type)->from_float_ref(row.data(), buf.data(), n);
        }
        ggml_backend_tensor_set(t, buf.data(), i*buf.size(), buf.size());
    };

    uint32_t i_first = 0; // of the stream's staged rows

    for (const bool is_cold : { false, true }) {
        llama_kv_cache & kv = is_cold ? *get_cold() : *get_hot();

        for (size_t i = 0; i < n_stream_state; ++i) {
            const auto & stream = tiers[is_cold].streams[i];
            const auto & idxs   = places[is_cold*n_stream_state + i].idxs;

            for (const bool is_v : { false, true }) {
                for (size_t il = 0; il < kv.layers.size(); ++il) {
                    ggml_tensor * t     = is_v ? kv.layers[il].v_stream[s0 + i] : kv.layers[il].k_stream[s0 + i];
                    ggml_tensor * stage = overflow ? overflow->get(is_v ? kv_hot->layers[il].v : kv_hot->layers[il].k) : nullptr;

                    uint32_t i_staged = i_first;

                    for (size_t j = 0; j < idxs.size();) {
                        if (idxs[j] != state_places::NONE) {
                            size_t n = 1;
                            while (j + n < idxs.size() && idxs[j + n] == idxs[j] + n) {
                                n++;
                            }
                            read_rows(t, idxs[j], n);
                            j += n;
                            continue;
                        }

                        if (is_cold) {
                            const auto mean = is_v ? stream.means.end() : stream.means.find(llama_kv_mixed_means::page_of(stream.cells[j].i));
                            read_back(t, mean == stream.means.end() ? nullptr : mean->second[il].data(), is_v ? n_rot_v : n_rot_k, stage, i_staged);
                        } else {
                            read_rows(stage, i_staged, 1);
                        }
                        i_staged++;
                        j++;
                    }
                }
            }

            i_first += std::count(idxs.begin(), idxs.end(), state_places::NONE);
        }
    }
}
