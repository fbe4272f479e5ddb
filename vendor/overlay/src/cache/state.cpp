// the saved state of a mixed KV cache: reading

#include "cache/kv-cache-mixed.h"
#include "cache/overflow.h"
#include "cache/state-io.h"
#include "cache/undo.h"
#include "formats/formats.h"

#include "llama-impl.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <map>
#include <numeric>
#include <optional>
#include <set>
#include <stdexcept>

struct llama_kv_cache_mixed::state_cell {
    uint32_t  i;
    llama_pos pos;
    llama_pos shift;

    llama_kv_cell_ext ext;

    llama_kv_cells::seq_set_t seqs;
};

struct llama_kv_cache_mixed::state_stream {
    uint32_t head; // where the search for free cells begins

    std::vector<state_cell> cells;

    // of the pages that the cells of cold are in, layer by layer
    std::map<uint32_t, std::vector<std::vector<uint8_t>>> means;
};

// where the cells of a tier of a state's stream go
struct llama_kv_cache_mixed::state_places {
    static constexpr uint32_t NONE = UINT32_MAX;

    std::vector<uint32_t> idxs; // by the state's cells; NONE: to cold, as hot tokens go there

    std::map<uint32_t, uint32_t> pages; // of the state, by those of this cache that take their means
};

struct llama_kv_cache_mixed::state_tier {
    std::vector<state_stream> streams;
};

static void check_layer(const char * tier, uint32_t il, const char * side, const ggml_tensor * t, int32_t type, uint64_t size_row) {
    if (type != t->type || size_row != t->nb[1]) {
        const char * name = type >= 0 && type < GGML_TYPE_COUNT ? ggml_type_name((ggml_type) type) : nullptr;

        throw std::runtime_error(format("the state has %s %s rows of type %s and %" PRIu64 " bytes in layer %u, this cache has %s and %zu bytes",
            tier, side, name ? name : "?", size_row, il, ggml_type_name(t->type), t->nb[1]));
    }
}

void llama_kv_cache_mixed::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    state_read_part(io, seq_id, flags);

    state_undo = nullptr;
}

void llama_kv_cache_mixed::state_read_rest(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags, llama_memory_i & rest) {
    auto * kv   = dynamic_cast<llama_kv_cache         *>(&rest);
    auto * recr = dynamic_cast<llama_memory_recurrent *>(&rest);

    GGML_ASSERT(kv || recr);

    undo before;

    try {
        if (!finish_shift()) {
            throw std::runtime_error("a shift of positions has failed, and does so again: clear the memory before a state is loaded");
        }

        if (kv) {
            before.add(*kv, seq_id, false);
        } else {
            before.add(*recr, seq_id);
        }

        state_part_reader in(io, flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE);
        rest.state_read(in, seq_id, flags);
        in.in.end();
    } catch (...) {
        before.restore();
        if (kv && state_undo) {
            state_clear(seq_id);
        }
        throw;
    }

    state_undo = nullptr;
}

void llama_kv_cache_mixed::state_clear(llama_seq_id seq_id) {
    if (state_undo) {
        state_undo->restore();
        state_undo = nullptr;
    } else {
        kv_cold->state_clear(seq_id);
        llama_kv_cache::state_clear(seq_id);
    }
}

void llama_kv_cache_mixed::state_read_part(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (!finish_shift()) {
        throw std::runtime_error("a shift of positions has failed, and does so again: clear the memory before a state is loaded");
    }

    const llama_kv_mixed_state_header expected;

    state_reader in(io);

    // a state of another kind may be shorter than the header
    llama_kv_mixed_state_header header;
    in.get(&header, 2*sizeof(uint32_t));

    if (header.magic != expected.magic) {
        throw std::runtime_error("this is not the state of a mixed KV cache: it was saved without LLAMA_KV_MIXED, or is damaged");
    }
    if (header.version != expected.version) {
        throw std::runtime_error(format("the state has version %u of the mixed KV cache's format, this library reads version %u",
            header.version, expected.version));
    }

    in.get(&header.n_stream, sizeof(header) - 2*sizeof(uint32_t));

    const uint32_t n_stream  = get_hot()->get_n_stream();
    const bool     on_device = flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE;

    if (header.whole != (seq_id == -1 ? 1u : 0u)) {
        throw std::runtime_error(seq_id == -1 ? "the state is that of one sequence, not of all" : "the state is that of all sequences, not of one");
    }
    if (header.n_stream != (seq_id == -1 ? n_stream : 1u)) {
        throw std::runtime_error(format("the state has %u streams, this cache has %u", header.n_stream, n_stream));
    }
    if ((header.on_device != 0) != on_device) {
        throw std::runtime_error(on_device ? "the rows of the state are in it, not on the device" : "the rows of the state were left on the device");
    }

    if (on_device && std::none_of(device_copies.begin(), device_copies.end(), [&](const auto & c) { return c.second == header.on_device; })) {
        throw std::runtime_error("the rows that were left on the device are not there any more: another state was left there since");
    }

    state_tier tiers[2];

    bool has_means = false;

    for (const bool is_cold : { false, true }) {
        const llama_kv_cache & kv = is_cold ? *get_cold() : *get_hot();

        const char * name = is_cold ? "cold" : "hot";

        const uint32_t n_layer = in.get<uint32_t>();

        // a cache whose context fits in hot has no layers in cold, and no tokens
        const bool is_none = is_cold && (n_layer == 0 || kv.layers.empty()) && n_layer <= LLAMA_MAX_LAYERS;

        if (n_layer != kv.layers.size() && !is_none) {
            throw std::runtime_error(format("the state has %u layers, this cache has %zu", n_layer, kv.layers.size()));
        }

        for (uint32_t i = 0; i < n_layer; ++i) {
            for (const bool is_v : { false, true }) {
                const int32_t  type     = in.get<int32_t >();
                const uint64_t size_row = in.get<uint64_t>();

                if (!is_none) {
                    const auto & layer = kv.layers[i];

                    check_layer(name, layer.il, is_v ? "V" : "K", is_v ? layer.v : layer.k, type, size_row);
                }
            }
        }

        if (is_cold) {
            const auto rot_k = in.get<int64_t>();
            const auto rot_v = in.get<int64_t>();

            if (!is_none && (rot_k != n_rot_k || rot_v != n_rot_v)) {
                throw std::runtime_error(format("the state has cold rows rotated in blocks of %" PRId64 " (K) and %" PRId64
                    " (V) values, this cache has %" PRId64 " and %" PRId64 " (0: not rotated, see LLAMA_ATTN_ROT_DISABLE)",
                    rot_k, rot_v, n_rot_k, n_rot_v));
            }

            const auto page = in.get<uint32_t>();
            has_means = page != 0;

            if (!is_none && page != (means ? LLAMA_KV_MIXED_PAGE : 0u)) {
                throw std::runtime_error(format("the state has cold rows of K that are stored %s, this cache stores them %s: "
                    "its mean=%s must be that of the cache that the state is from",
                    page == 0 ? "as they are" : format("less the means of pages of %u cells", page).c_str(),
                    means ? format("less the means of pages of %d cells", LLAMA_KV_MIXED_PAGE).c_str() : "as they are", means ? "on" : "off"));
            }
        }

        for (uint32_t s = 0; s < header.n_stream; ++s) {
            const uint32_t n = in.get<uint32_t>();
            if (n > 0 && n_layer == 0) {
                throw std::runtime_error(format("the state has %u %s tokens, and no layers of them", n, name));
            }
            if (n > kv.get_size()) {
                throw std::runtime_error(format("the state holds %u %s tokens, %s=%u has no room for them",
                    n, name, is_cold ? "cold_size" : "hot", kv.get_size()));
            }

            state_stream stream;
            stream.head = in.get<uint32_t>();

            for (uint32_t i = 0; i < n; ++i) {
                state_cell cell;
                cell.i     = in.get<uint32_t>();
                cell.pos   = in.get<llama_pos>();
                cell.shift = in.get<llama_pos>();
                cell.ext   = in.get<llama_kv_cell_ext>();

                if (i > 0 && cell.i <= stream.cells.back().i) {
                    throw std::runtime_error("the cells of the state are out of order");
                }

                // one more, and the position before the shift with either sign, must be positions as well
                if (cell.pos < 0 || cell.pos == INT32_MAX || std::abs((int64_t) cell.shift) >= INT32_MAX || std::abs((int64_t) cell.pos - cell.shift) >= INT32_MAX) {
                    throw std::runtime_error("a position of the state is out of range");
                }

                if (seq_id != -1) {
                    cell.seqs.set(seq_id);
                } else {
                    const uint32_t n_seqs = in.get<uint32_t>();
                    if (n_seqs == 0 || n_seqs > kv.get_n_seq_max()) {
                        throw std::runtime_error(format("a cell of the state has %u sequences", n_seqs));
                    }

                    for (uint32_t j = 0; j < n_seqs; ++j) {
                        const llama_seq_id cur = in.get<llama_seq_id>();
                        if (cur < 0 || (uint32_t) cur >= kv.get_n_seq_max() || get_stream(cur) != s || cell.seqs.test(cur)) {
                            throw std::runtime_error(format("a cell of the state has sequence %d, which it can not have here", cur));
                        }
                        cell.seqs.set(cur);
                    }
                }

                stream.cells.push_back(cell);
            }

            if (is_cold && has_means) {
                std::vector<uint32_t> idxs;
                for (const auto & cell : stream.cells) {
                    idxs.push_back(cell.i);
                }

                for (size_t i = 0; i < kv.layers.size(); ++i) {
                    for (const uint32_t page : llama_kv_mixed_means::get_pages(idxs)) {
                        stream.means[page].emplace_back(means->get_size(i));
                        in.get(stream.means[page].back().data(), means->get_size(i));
                    }
                }
            }

            tiers[is_cold].streams.push_back(std::move(stream));
        }
    }

    in.end();

    state_undo = std::make_shared<undo>();
    state_undo->add(*get_hot (), seq_id, true);
    state_undo->add(*get_cold(), seq_id, false);
    if (means) {
        state_undo->add(*means, *get_cold(), seq_id);
    }

    try {
        state_apply(in, tiers, seq_id, on_device);
    } catch (...) {
        state_clear(seq_id);
        throw;
    }

    if (trace->is_on()) {
        trace->push(make_event(LLAMA_KV_MIXED_EVENT_STATE_READ, -1, seq_id));
    }
}

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

        if (move_tokens_to_cold_cache(strm, n_free, LLAMA_KV_MIXED_TRIGGER_ROOM) == 0) {
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

template <typename R>
void llama_kv_cache_mixed::state_apply(R & in, const state_tier * tiers, llama_seq_id seq_id, bool on_device) {
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

template <typename R>
void llama_kv_cache_mixed::state_read_rows(
        R & in, const state_tier * tiers, const std::vector<state_places> & places, uint32_t s0, llama_kv_mixed_overflow * overflow, bool on_device) {
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
