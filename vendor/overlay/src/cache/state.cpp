// the saved state of a mixed KV cache: reading

#include "cache/kv-cache-mixed.h"
#include "cache/overflow.h"
#include "cache/state-io.h"
#include "cache/undo.h"

#include "llama-impl.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <optional>
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

            tiers[is_cold].streams.push_back(std::move(stream));
        }
    }

    in.end();

    state_undo = std::make_shared<undo>();
    state_undo->add(*get_hot (), seq_id, true);
    state_undo->add(*get_cold(), seq_id, false);

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

template <typename R>
void llama_kv_cache_mixed::state_apply(R & in, const state_tier * tiers, llama_seq_id seq_id, bool on_device) {
    const uint32_t s0 = seq_id == -1 ? 0 : get_stream(seq_id);

    // hot cells of the state for which there is no room in hot, ascending
    std::vector<uint32_t> over;
    std::optional<llama_kv_mixed_overflow> overflow;

    if (seq_id != -1) {
        over = state_make_room(seq_id, tiers[0].streams[0].cells, tiers[1].streams[0].cells.size(), on_device);

        if (!over.empty()) {
            overflow.emplace(pairs, over.size());
        }
    } else {
        for (llama_kv_cache * kv : { get_hot(), get_cold() }) {
            kv->llama_kv_cache::clear(true);
        }
    }

    std::vector<slot_info> slots; // of hot, then cold, by stream

    for (const bool is_cold : { false, true }) {
        llama_kv_cache & kv = is_cold ? *get_cold() : *get_hot();

        for (size_t i = 0; i < tiers[is_cold].streams.size(); ++i) {
            const auto & stream = tiers[is_cold].streams[i];

            auto part = stream.cells;

            if (!is_cold) {
                for (auto it = over.rbegin(); it != over.rend(); ++it) {
                    part.erase(part.begin() + *it);
                }
            }

            auto & cells = kv.v_cells[s0 + i];

            // all goes on bit for bit as it would have where the state is from, as long as nothing else is in the way
            if (cells.get_used() == 0) {
                kv.v_heads[s0 + i] = std::min(stream.head, cells.size());
            }

            // to the cells that they had, or to the first free ones
            const bool same = std::all_of(part.begin(), part.end(), [&](const state_cell & cell) {
                return cell.i < cells.size() && cells.is_empty(cell.i);
            });

            slot_info sinfo;
            sinfo.s0 = s0 + i;
            sinfo.s1 = s0 + i;
            sinfo.resize(1);
            sinfo.strm[0] = s0 + i;

            uint32_t i_free = 0;

            for (const auto & cell : part) {
                if (same) {
                    i_free = cell.i;
                }
                while (!cells.is_empty(i_free)) {
                    i_free++;
                }

                set_cell(cells, i_free, cell.pos, cell.shift, cell.ext, cell.seqs);
                sinfo.idxs[0].push_back(i_free);
            }

            slots.push_back(sinfo);
        }
    }

    const auto idxs_over = get_free_cold(s0, over.size());

    for (size_t i = 0; i < over.size(); ++i) {
        const auto & cell = tiers[0].streams[0].cells[over[i]];

        set_cell(kv_cold->v_cells[s0], idxs_over[i], cell.pos, cell.shift, cell.ext, cell.seqs);
    }

    std::vector<uint8_t> buf;

    const auto read_rows = [&](ggml_tensor * t, uint32_t first, size_t n) {
        const size_t size_row = t->nb[1];

        if (on_device) {
            in.io.read_tensor(as_bytes(t), first*size_row, n*size_row);
            return;
        }

        buf.resize(n*size_row);
        for (size_t r = 0; r < n; ++r) {
            in.get(buf.data() + r*size_row, size_row);
        }
        ggml_backend_tensor_set(t, buf.data(), first*size_row, buf.size());
    };

    try {
        size_t i_slot = 0;

        for (const bool is_cold : { false, true }) {
            llama_kv_cache & kv = is_cold ? *get_cold() : *get_hot();

            for (size_t i = 0; i < tiers[is_cold].streams.size(); ++i) {
                const auto & sinfo = slots[i_slot++];

                for (const bool is_v : { false, true }) {
                    for (const auto & layer : kv.layers) {
                        ggml_tensor * t = is_v ? layer.v_stream[sinfo.strm[0]] : layer.k_stream[sinfo.strm[0]];

                        if (is_cold || over.empty()) {
                            for_each_run(sinfo.idxs[0], [&](uint32_t first, size_t n) { read_rows(t, first, n); });
                            continue;
                        }

                        ggml_tensor * t_over = overflow->get(is_v ? layer.v : layer.k);

                        size_t i_over = 0;

                        for (size_t j = 0; j < tiers[0].streams[0].cells.size(); ++j) {
                            if (i_over < over.size() && over[i_over] == j) {
                                read_rows(t_over, i_over++, 1);
                            } else {
                                read_rows(t, sinfo.idxs[0][j - i_over], 1);
                            }
                        }
                    }
                }
            }
        }

        in.end();

        if (overflow) {
            std::vector<int64_t> rows(idxs_over.begin(), idxs_over.end());
            for (int64_t & row : rows) {
                row += (int64_t) s0*kv_cold->get_size();
            }

            if (!overflow->move(rows, get_n_threads())) {
                throw std::runtime_error("the tokens of the state that hot has no room for can not be moved to cold");
            }
        }
    } catch (...) {
        // half a state is none, and rows that are no numbers would be seen even in free cells
        auto & idxs_last = slots.back().idxs[0];
        idxs_last.insert(idxs_last.end(), idxs_over.begin(), idxs_over.end());

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
