// the saved state of a mixed KV cache: reading

#include "cache/kv-cache-mixed.h"
#include "cache/state-io.h"
#include "cache/state.h"
#include "cache/undo.h"

#include "llama-impl.h"

#include <algorithm>
#include <cinttypes>
#include <cstdlib>
#include <stdexcept>

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
