#pragma once

#include "llama-kv-cache.h"

#include "llama-kv-mixed.h"

#include "cache/means.h"
#include "cache/mover.h"
#include "cache/policy.h"
#include "cache/splitter.h"
#include "cache/trace.h"

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

//
// llama_kv_cache_mixed
//

// two instances of llama_kv_cache over the same layers: the newest tokens are in hot, older ones are quantised in cold
//
// - hot is the base class: wherever upstream has a llama_kv_cache for the attention layers of a model (alone, beside one
//   for sliding windows, beside a recurrent state), this takes its place, and new rows are stored as they always were
// - new tokens always go to hot; a migration moves the oldest of them to cold, data first, then metadata
// - every (sequence, position) is in exactly one of the two
// - within a sequence everything in cold is older than everything in hot, except the sinks
// - where the whole context fits in hot there is no cold, and all is as in a plain cache
//
// rows that are quantised are rotated before that, as upstream does it; those in hot are not: short texts are computed as
// in a plain cache, and the attention over both rotates what meets cold rows

class llama_kv_mixed_overflow;
class state_reader;

class llama_kv_cache_mixed : public llama_kv_cache {
public:
    // type_k, type_v: the hot types
    // n_ctx_seq:      the tokens that one stream must be able to hold
    // n_pad:          the numbers of cells must be multiples of this
    // rotate:         false: no rows are rotated, whatever the types
    // throws std::runtime_error with one sentence when the model or the parameters do not allow a mixed cache
    llama_kv_cache_mixed(
                  const llama_model & model,
                const llama_hparams & hparams,
                          ggml_type   type_k,
                          ggml_type   type_v,
        const llama_kv_mixed_params & params,
                               bool   offload,
                               bool   unified,
                           uint32_t   n_ctx_seq,
                           uint32_t   n_seq_max,
                           uint32_t   n_pad,
              const layer_filter_cb & filter,
               const layer_reuse_cb & reuse,
                         bool   rotate = true);

    ~llama_kv_cache_mixed();

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) override;

    llama_memory_context_ptr init_full() override;

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override;

    void clear(bool data) override;

    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // state write/load

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // llama_kv_cache
    //

    // plans the ubatches; the places are found when they are applied, after what has to move has moved
    // returns as many empty slot infos, none when the ubatches do not fit
    slot_info_vec_t prepare(const std::vector<llama_ubatch> & ubatches) override;

    // undo a state_read_part() whose memory could not be read to the end; else: nothing of the sequence (-1: of all) is left
    void state_clear(llama_seq_id seq_id) override;

    //
    // llama_kv_cache_mixed specific API
    //

    llama_kv_cache * get_hot () const;
    llama_kv_cache * get_cold() const; // without cells and layers where everything fits in hot

    // false: the whole context fits in hot
    bool has_cold() const;

    // all cells of a layer's V, as llama_kv_cache::get_k_storage() has those of K
    static ggml_tensor * get_v_storage(const llama_kv_cache & kv, int32_t il);

    // null: rows of K are stored as they are
    const llama_kv_mixed_means * get_means() const;

    // all means of a layer's K, [n_embd_k_gqa, n_page, n_stream], null: as above
    ggml_tensor * get_k_mean(int32_t il) const;

    const llama_kv_mixed_params & get_params() const;

    // the tokens that one stream was asked to hold
    uint32_t get_n_ctx_seq() const;

    // The most tokens that the next ubatch of a batch may have, after the given ones; n_ubatch when nothing limits it, or
    // when what is left of the batch does not fit anyway. The last n_tail tokens of a sequence are not split, which takes a
    // ubatch of more tokens than that.
    // A batch is followed from ubatch to ubatch: each call has those of the call before and what was split off since, and
    // one without any begins anew.
    uint32_t get_n_ubatch(const llama_batch_allocr & balloc, const std::vector<llama_ubatch> & ubatches, uint32_t n_ubatch, uint32_t n_tail);

    // The next ubatch of a batch, as llama_batch_allocr makes it, but no larger than hot has room for. Where sequences must
    // stay whole it is all that is left, or one sequence.
    llama_ubatch split_simple(llama_batch_allocr & balloc, const std::vector<llama_ubatch> & ubatches, uint32_t n_ubatch);
    llama_ubatch split_equal (llama_batch_allocr & balloc, const std::vector<llama_ubatch> & ubatches, uint32_t n_ubatch, bool sequential);

    // dst [n_cold + cells of hot in view, n_tokens/n_stream, 1, n_stream], in the host's memory
    void set_mask(ggml_tensor * dst, uint32_t n_cold, const llama_ubatch & ubatch, bool causal_attn) const;

    // a head's rows in cold are rotated in blocks of so many values, 0: they are not
    int64_t get_n_rot_k() const;
    int64_t get_n_rot_v() const;

    llama_kv_mixed_stats get_stats() const;

    llama_kv_mixed_trace & get_trace() const;

    // The cache is complete, and will be used: says so in the log, and when it ends what it has done. Begins the trace that
    // LLAMA_KV_MIXED_TRACE asks for. hot_auto: the size of hot was left open.
    void announce(bool hot_auto);

    // tokens of a sequence that are hot, and cold
    std::pair<uint32_t, uint32_t> get_seq_use(llama_seq_id seq_id) const;

    // begin a trace, n_max == 0: end it
    void trace_start(uint32_t n_max, uint32_t flags);

    // padded number of cold cells in use, over the streams of sinfo; 0 when they hold none
    uint32_t get_n_cold(const slot_info & sinfo) const;

    // find places in hot for the ubatch, migrating first when there are not enough
    // an empty result: hot and cold are full, nothing changed
    slot_info find_slot(const llama_ubatch & ubatch);

    // after the ubatch has been placed in sinfo: migrate once when that passed the threshold
    // the rows of the ubatch itself are yet to be computed and stay
    void commit(const slot_info & sinfo);

    // a ubatch that was placed in sinfo has failed: forget its cells, whose rows were never computed
    // (seq_rm(), which llama_context::decode() calls then, leaves tokens that other sequences share)
    void drop(const slot_info & sinfo, const llama_ubatch & ubatch);

    // one migration: move up to n of the oldest unpinned tokens of a stream from hot to cold, leaving the cells in flight
    // alone; returns how many were moved: all at once, or none
    uint32_t move_tokens_to_cold_cache(uint32_t strm, uint32_t n, llama_kv_mixed_trigger trigger, const std::vector<uint32_t> & in_flight = {});

    // for tests: the next n migrations fail to copy their rows
    void fail_moves(uint32_t n);

    // for tests: the next shift fails when it has computed the rows of n layers
    void fail_shift(uint32_t n) { n_shift_fail = n; }

    //
    // position shifts, see shift.cpp
    //

    // carry out those that are pending in hot and cold; false: not all of them, the next call goes on
    bool update(llama_context * lctx);

    // the same for another part of the memory, after its copies of streams
    bool update(llama_context * lctx, llama_kv_cache & kv, const stream_copy_info & sc_info);

    // the update of a part of the memory that is not mixed: this cache does it, so that it is done or tried again
    llama_memory_context_ptr init_update(llama_context * lctx, llama_kv_cache & kv);

    // rows and positions do not belong together, here or in that other part: an update has failed, or has yet to come
    bool is_shift_pending() const;

    // The state of a memory that this cache is a part of: this part, then the rest of it with a checksum of its own. When one
    // of the two below throws, both parts are as they were (llama_memory_hybrid calls state_clear() by itself for that).
    void state_write_rest(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags, llama_memory_i & rest) const;

    void state_read_part(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags);
    void state_read_rest(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags, llama_memory_i & rest);

    // complete a shift that has stopped half way, and all that is pending in another part of the memory; false: that failed
    // (again), and rows must neither be read nor moved
    bool finish_shift(llama_kv_cache * rest = nullptr) const;

private:
    // what the constructor makes of the parameters it is given
    struct setup {
        llama_kv_mixed_params params;
    };

    static setup make_setup(
                const llama_hparams & hparams,
                          ggml_type   type_k,
                          ggml_type   type_v,
        const llama_kv_mixed_params & params,
                           uint32_t   n_ctx_seq,
                           uint32_t   n_pad,
              const layer_filter_cb & filter);

    llama_kv_cache_mixed(
                  const llama_model & model,
                const llama_hparams & hparams,
                          ggml_type   type_k,
                          ggml_type   type_v,
                        const setup & su,
                               bool   offload,
                               bool   unified,
                           uint32_t   n_ctx_seq,
                           uint32_t   n_seq_max,
                           uint32_t   n_pad,
              const layer_filter_cb & filter,
               const layer_reuse_cb & reuse,
                         bool   rotate);

    const llama_kv_mixed_params params;
    const llama_kv_mixed_policy policy;

    const uint32_t n_ctx_seq;

    int64_t n_rot_k = 0;
    int64_t n_rot_v = 0;

    // the base class (whose virtual functions lead back here: call them as llama_kv_cache::f())
    llama_kv_cache * const kv_hot = this;

    std::unique_ptr<llama_kv_cache> kv_cold;

    std::unique_ptr<llama_kv_mixed_means> means;

    // hot and cold tensors, K and V of all layers
    std::vector<llama_kv_mixed_mover::pair> pairs;

    std::unique_ptr<llama_kv_mixed_mover> mover;

    std::unique_ptr<llama_kv_mixed_trace> trace;

    // bytes that a plain cache of the hot type takes for the same context
    uint64_t bytes_plain = 0;

    uint64_t n_migrations   = 0;
    uint64_t n_tokens_moved = 0;
    uint64_t n_refused      = 0;
    uint64_t t_migrate_us   = 0;

    // a batch that is tried with several splits is refused once
    bool is_refused = false;

    // the log tells of this cache, see announce()
    bool is_announced = false;

    // the context of the last update: its threads compute migrations, and its queued work is waited for
    // null when the cache is driven without one
    llama_context * lctx = nullptr;

    // as it is, or as if one sequence were gone
    llama_kv_mixed_plan get_plan(uint32_t strm, llama_seq_id without = -1) const;

    // the plans of all streams
    std::vector<llama_kv_mixed_plan> get_plans() const;

    // of the batch that is being split
    std::optional<llama_kv_mixed_splitter> splitter;

    const llama_kv_mixed_splitter & follow(const llama_batch_allocr & balloc, const std::vector<llama_ubatch> & ubatches);

    // see llama_kv_mixed_whole_reason()
    const char * get_whole_reason() const;

    // why the ubatches can not be decoded, "": they can
    std::string get_misfit(const std::vector<llama_ubatch> & ubatches) const;

    // the ubatch's tokens in each of its streams
    std::vector<llama_kv_mixed_share> get_shares(const llama_ubatch & ubatch) const;

    // free cells in cold, lowest index first, so that the part in use stays compact
    std::vector<uint32_t> get_free_cold(uint32_t strm, uint32_t n) const;

    // make room for a ubatch of the given size in hot
    bool make_room(uint32_t strm, uint32_t n);

    std::string describe_use() const;

    // for migrations
    int get_n_threads() const;

    // puts a token into an empty cell, with a shift that is still pending
    static void set_cell(
                            llama_kv_cells & cells,
                                  uint32_t   i,
                                 llama_pos   pos,
                                 llama_pos   shift,
                   const llama_kv_cell_ext & ext,
           const llama_kv_cells::seq_set_t & seqs);

    //
    // position shifts, see shift.cpp
    //

    struct shift_devices;
    struct shift_graph;

    // how far cells [first, first + shift.size()) of a stream have moved, and in how many layers their rows have followed
    struct shift_job {
        llama_kv_cache * kv;

        uint32_t strm;
        uint32_t first;

        std::vector<llama_pos> shift;

        size_t n_done;

        // by page of these cells, where rows are stored less a mean, how far that turns with the rows: a page of which all
        // tokens move as far; 0: it stays, and rows that move are stored less the mean that is there
        std::vector<llama_pos> turn;
    };

    // those that have stopped half way: some layers are done, others are not
    std::vector<shift_job> shift_jobs;

    // made once, for the first shift
    std::shared_ptr<shift_devices> shift_devs;

    // the part of the memory that is not mixed and has positions to shift, null: there is none, or it never had an update
    llama_kv_cache * kv_rest = nullptr;

    // layers until the next failure, below 0: there is none to come
    int64_t n_shift_fail = -1;

    // what is pending in the cells of a cache
    void add_shift_jobs(llama_kv_cache & kv, std::vector<shift_job> & jobs) const;

    // see shift_job::turn; cells [first, end) are whole pages
    static std::vector<llama_pos> get_turns(const llama_kv_cells & cells, uint32_t first, uint32_t end);

    shift_graph build_shift(llama_context * lctx, const shift_job & job, size_t i_layer) const;

    // one layer, all of it or nothing
    bool compute_shift(llama_context * lctx, ggml_backend_sched_t sched, const shift_job & job, size_t i_layer);

    // takes jobs away that are done; false: those that are left are not
    bool run_shift_jobs(llama_context * lctx, std::vector<shift_job> & jobs);

    // all layers are done: the cells have no more to shift than what was added since
    static void settle_shift(const shift_job & job);

    // the rows of a stream were copied to another one as they are
    void copy_shift_jobs(const llama_kv_cache & kv, uint32_t ssrc, uint32_t sdst);

    // first what has stopped half way in any cache, then all of these
    bool shift(llama_context * lctx, const std::vector<llama_kv_cache *> & kvs);

    //
    // state, see state.cpp and state-place.cpp
    //

    struct state_cell;
    struct state_stream;
    struct state_tier;
    struct state_places;

    // Remove a sequence, and make room for the cells that a state has of it. The others make way, but for their sinks: where
    // these are in the way, the oldest of the state's hot cells have to go to cold.
    // Returns the indices of these, ascending. Throws when there is no room, and nothing changed.
    std::vector<uint32_t> state_make_room(llama_seq_id seq_id, const std::vector<state_cell> & hot, uint32_t n_cold, bool on_device);

    // the n of a sequence's cells that leave hot first
    std::vector<uint32_t> state_oldest(llama_seq_id seq_id, const std::vector<state_cell> & cells, uint32_t n) const;

    // Where cells of a state go: to those that they had, or to the first free ones. Those at out, ascending, go to none.
    static state_places state_find_cells(const llama_kv_cells & cells, const std::vector<state_cell> & wanted, const std::vector<uint32_t> & out);

    // The same for cold, where rows are stored less the means of pages: a page of the state goes to one that is empty, or has the
    // same means. Where there is none its tokens go to cold as hot ones do, which rounds their rows once more.
    state_places state_find_pages(const state_stream & stream, uint32_t strm) const;

    // put cells in place, those of hot and of cold, and read their rows
    void state_apply(state_reader & in, const state_tier * tiers, llama_seq_id seq_id, bool on_device);

    // cells of cold for those that have no place; slots get them as well
    llama_kv_mixed_moves state_place_staged(const state_tier * tiers, const std::vector<state_places> & places, uint32_t s0, std::vector<slot_info> & slots);

    // overflow: where the rows of those are put as hot ones, null: there are none
    void state_read_rows(
            state_reader & in, const state_tier * tiers, const std::vector<state_places> & places, uint32_t s0, llama_kv_mixed_overflow * overflow, bool on_device);

    // what was there before the state that is being read, see undo.h
    class undo;

    std::shared_ptr<undo> state_undo;

    // the copies of rows that the context keeps on the device, one for each sequence, by the states that they belong to
    mutable std::map<llama_seq_id, uint32_t> device_copies;

    mutable std::vector<uint8_t> buf_mask; // room for one side's

    mutable uint32_t n_device_copies = 0;

    // a tensor as mere bytes: buffers that keep rows on the device count in elements, which blocks of quantised ones are not
    ggml_tensor * as_bytes(ggml_tensor * t) const;

    mutable ggml_context_ptr ctx_bytes;
    mutable std::map<const ggml_tensor *, ggml_tensor *> bytes;

    //
    // a migration, see migration.cpp
    //

    // cells src[i] of hot go to the free cells dst[i] of cold
    struct migration {
        uint32_t strm;

        std::vector<uint32_t> src;
        std::vector<uint32_t> dst;
    };

    // Rows src go to the free cells dst of a stream of cold. Pages that have no token get a mean of the rows that come: to be
    // called before the cells have their tokens.
    llama_kv_mixed_moves get_moves(const std::vector<uint32_t> & src, uint32_t strm, const std::vector<uint32_t> & dst) const;

    bool is_page_empty(uint32_t strm, uint32_t page) const;

    // up to n of the oldest tokens that may move; empty: there are none, or cold is full
    migration pick(uint32_t strm, uint32_t n, const std::vector<uint32_t> & in_flight) const;

    // the rows; false: it failed, and nothing that is in use has changed. A GPU does it later: see llama_kv_mixed_mover::move()
    bool copy(const migration & mig);

    // rows are where they belong: nothing that the context was given is on its way
    void synchronize() const;

    // the cells
    void commit(const migration & mig);

    // the trace's record of a migration that is about to begin, and of the one that is complete
    llama_kv_mixed_event make_event(const migration & mig, llama_kv_mixed_trigger trigger) const;

    void record(const migration & mig, llama_kv_mixed_event event, int64_t dur_us);

    // what quantisation did to rows that have just been copied; layer by layer into the trace as well if that is wanted
    void measure_error(const migration & mig, llama_kv_mixed_event & event, std::vector<llama_kv_mixed_layer_error> & layers) const;

    // a record of the stream's occupancy (-1: of all streams), about a sequence (-1: about none in particular)
    llama_kv_mixed_event make_event(llama_kv_mixed_event_kind kind, int32_t strm, llama_seq_id seq_id = -1, llama_pos p0 = -1, llama_pos p1 = -1) const;
};

// the mixed cache that a memory is or has within, null: none
llama_kv_cache_mixed * llama_kv_mixed_find(llama_memory_i * mem);
