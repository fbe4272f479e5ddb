// the saved state of a mixed KV cache: writing

#include "cache/kv-cache-mixed.h"
#include "cache/state-io.h"

#include "llama-impl.h"

#include <algorithm>

ggml_tensor * llama_kv_cache_mixed::as_bytes(ggml_tensor * t) const {
    const auto it = bytes.find(t);
    if (it != bytes.end()) {
        return it->second;
    }

    if (!ctx_bytes) {
        ctx_bytes.reset(ggml_init({
            /*.mem_size   =*/ 4*get_hot()->layers.size()*get_hot()->get_n_stream()*ggml_tensor_overhead(),
            /*.mem_buffer =*/ nullptr,
            /*.no_alloc   =*/ true,
        }));
    }

    ggml_tensor * res = ggml_view_tensor(ctx_bytes.get(), t);

    res->buffer = t->buffer;

    res->type  = GGML_TYPE_I8;
    res->ne[0] = ggml_nbytes(t);
    res->nb[0] = 1;
    for (int i = 1; i < GGML_MAX_DIMS; ++i) {
        res->ne[i] = 1;
        res->nb[i] = res->ne[0];
    }

    return bytes[t] = res;
}

void llama_kv_cache_mixed::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (!finish_shift()) {
        throw std::runtime_error("a shift of positions has failed, and does so again: there is no state to save");
    }

    const uint32_t n_stream  = get_hot()->get_n_stream();
    const bool     on_device = flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE;

    llama_kv_mixed_state_header header;

    std::vector<uint32_t> strms;

    if (seq_id == -1) {
        header.whole    = 1;
        header.n_stream = n_stream;

        for (uint32_t s = 0; s < n_stream; ++s) {
            strms.push_back(s);
        }
    } else {
        strms.push_back(get_stream(seq_id));
    }

    state_writer out(io);

    if (on_device) {
        header.on_device = n_device_copies + 1;

        if (!out.counts_only) {
            device_copies[seq_id] = ++n_device_copies;
        }
    }

    out.put(header);

    std::vector<std::vector<uint32_t>> idxs; // of hot, then cold, by stream

    for (const llama_kv_cache * kv : { get_hot(), get_cold() }) {
        out.put<uint32_t>(kv->layers.size());

        for (const auto & layer : kv->layers) {
            for (const ggml_tensor * t : { layer.k, layer.v }) {
                out.put<int32_t >(t->type);
                out.put<uint64_t>(t->nb[1]);
            }
        }

        if (kv == get_cold()) {
            out.put(n_rot_k);
            out.put(n_rot_v);
            out.put<uint32_t>(means ? LLAMA_KV_MIXED_PAGE : 0);
        }

        for (const uint32_t s : strms) {
            const auto & cells = kv->v_cells[s];

            idxs.emplace_back();

            for (uint32_t i = 0; i < cells.size(); ++i) {
                if (!cells.is_empty(i) && (seq_id == -1 || cells.seq_has(i, seq_id))) {
                    idxs.back().push_back(i);
                }
            }

            // of a sequence alone nothing that other sequences change: behind its newest token, where it stands in most cases
            uint32_t head = kv->v_heads[s];
            if (seq_id != -1) {
                const auto newest = std::max_element(idxs.back().begin(), idxs.back().end(), [&](uint32_t a, uint32_t b) {
                    return cells.pos_get(a) < cells.pos_get(b);
                });
                head = newest == idxs.back().end() ? 0 : *newest + 1;
            }

            out.put<uint32_t>(idxs.back().size());
            out.put(head);

            for (const uint32_t i : idxs.back()) {
                out.put(i);
                out.put(cells.pos_get(i));
                out.put(cells.get_shift(i));
                out.put(cells.ext_get(i));

                if (seq_id == -1) {
                    out.put<uint32_t>(cells.seq_count(i));

                    for (llama_seq_id cur = 0; cur < LLAMA_MAX_SEQ; ++cur) {
                        if (cells.seq_has(i, cur)) {
                            out.put(cur);
                        }
                    }
                }
            }

            // (in the state itself even where rows are left on the device: they are looked at before anything changes)
            for (size_t i = 0; means && kv == get_cold() && i < kv->layers.size(); ++i) {
                std::vector<uint8_t> mean(means->get_size(i));
                for (const uint32_t page : llama_kv_mixed_means::get_pages(idxs.back())) {
                    if (!out.counts_only) {
                        ggml_backend_tensor_get(means->get(i), mean.data(), means->get_offset(i, s, page), mean.size());
                    }
                    out.put(mean.data(), mean.size());
                }
            }
        }
    }

    out.end();

    size_t i_part = 0;

    for (const llama_kv_cache * kv : { get_hot(), get_cold() }) {
        for (const uint32_t s : strms) {
            const auto & part = idxs[i_part++];

            for (const bool is_v : { false, true }) {
                for (const auto & layer : kv->layers) {
                    ggml_tensor * t = is_v ? layer.v_stream[s] : layer.k_stream[s];

                    const size_t size_row = t->nb[1];

                    if (out.counts_only && !on_device) {
                        io.write(nullptr, part.size()*size_row);
                        continue;
                    }

                    for_each_run(part, [&](uint32_t first, size_t n) {
                        if (on_device) {
                            io.write_tensor(as_bytes(t), first*size_row, n*size_row);
                        } else {
                            out.put(t, first*size_row, n*size_row);
                        }
                    });
                }
            }
        }
    }

    out.end();

    if (trace->is_on() && !out.counts_only) {
        trace->push(make_event(LLAMA_KV_MIXED_EVENT_STATE_WRITE, -1, seq_id));
    }
}

void llama_kv_cache_mixed::state_write_rest(
        llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags, llama_memory_i & rest) const {
    state_part_writer out(io, flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE);

    // upstream's format has no place for shifts that are pending
    auto * kv = dynamic_cast<llama_kv_cache *>(&rest);
    if (kv && kv->get_has_shift() && !out.out.counts_only && !finish_shift(kv)) {
        throw std::runtime_error("positions have been shifted, and rows of the layers with a sliding window can not follow: decode first");
    }

    rest.state_write(out, seq_id, flags);

    out.out.end();
}
