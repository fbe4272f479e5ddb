// The C interface of the mixed KV cache: plain declarations only, no preprocessor.
// C and C++ include llama-kv-mixed.h, which wraps this file; the Python bindings read it as it is.
//
// A struct that begins with struct_size has it set to its sizeof by the caller before any call, so that programs and
// libraries of different age go together. One that the library reads may be shorter than the library's: the rest has its
// defaults (0 where none are named); a longer one is refused. One that the library fills may be shorter or longer: it is
// filled as far as both know it, and struct_size says how far. A struct_size that leaves no room for a field is refused.
// Other structs are as long as llama_kv_mixed_sizeof() says.

// How attention over a mixed KV cache is computed.
enum llama_kv_mixed_attn_type {
    LLAMA_KV_MIXED_ATTN_AUTO    = 0, // fused where the cache is in the CPU's memory, else composed
    LLAMA_KV_MIXED_ATTN_FUSED   = 1, // our own kernel, one pass over hot and cold rows as they are stored
    LLAMA_KV_MIXED_ATTN_COMPOSE = 2, // stock ggml operations: cold rows are expanded beside the hot ones
};

// How a mixed KV cache is shaped. Start from llama_kv_mixed_default_params(), which sets struct_size as well. The hot types are those of llama_context_params (type_k, type_v).
struct llama_kv_mixed_params {
    size_t struct_size;

    uint32_t n_hot;     // hot cells per stream; 0: 512 for each of the sequences that share the stream, but no more than an eighth of
                        // its tokens (and no less than 512)
    uint32_t n_cold;    // cold cells per stream, 0: what the context needs beyond n_hot, none when it fits there
    uint32_t n_group;   // most tokens that one migration moves (never more than a quarter of n_hot)
    uint32_t n_sink;    // positions [0, n_sink) of every sequence stay hot, of all sequences up to half of n_hot

    float threshold;    // migrate when hot use passes this share of n_hot, (0, 1]

    int32_t type_cold_k; // enum ggml_type of cold K rows; -1: IQ4_NL where the device that holds them has it, else Q4_0
    int32_t type_cold_v; // the same of cold V rows

    int32_t attn;        // enum llama_kv_mixed_attn_type

    int32_t mean;        // 1: where cold K is quantised, its rows are stored less the mean of their page of 128 cells; 0: as they are

    float v_skip;        // where the fused kernel decodes on a CPU: the share of a query's weights that cold cells may have together whose
                         // V is left unread, [0, 1); 0: all is read
};

// What a mixed KV cache holds and has done so far.
// Where a context's memory is more than that (sliding windows, recurrent states), all but bytes_rest is about the layers
// that attend to the whole context.
struct llama_kv_mixed_stats {
    size_t struct_size;

    uint32_t n_stream;  // streams (1 when unified, else one per sequence)
    uint32_t hot_size;  // cells, all streams together
    uint32_t hot_used;
    uint32_t cold_size;
    uint32_t cold_used;
    uint32_t n_layer;   // layers that hold K/V

    int32_t type_hot_k;  // enum ggml_type
    int32_t type_hot_v;
    int32_t type_cold_k;
    int32_t type_cold_v;

    uint64_t bytes_hot;   // bytes allocated for hot K and V
    uint64_t bytes_cold;  // bytes allocated for cold K and V
    uint64_t bytes_plain; // bytes that a plain cache of the hot type takes for the same context size

    uint64_t n_migrations;   // completed migrations
    uint64_t n_tokens_moved; // cells moved from hot to cold
    uint64_t n_refused;      // batches refused because hot and cold were full
    uint64_t t_migrate_us;   // time spent moving, microseconds; the host's part where a GPU does it later

    uint64_t bytes_rest;     // bytes allocated for what is not mixed: the cache of sliding windows, recurrent states
};

// hot auto (0), cold auto (-1), group 128, threshold 0.8, sink 4, attn auto, mean 1, v_skip 0
struct llama_kv_mixed_params llama_kv_mixed_default_params(void);

// Reads a spec such as "hot=512,cold=q4_0,group=128,threshold=0.8,sink=4" into *params. It may begin with the name of a preset
// ("1" and "on" are the defaults), whose parameters the rest changes: "quality,hot=1024".
// Returns 0; or, with *params untouched, 1 when the spec asks for a plain cache ("0", "off" or nothing), -1 when it is wrong, with
// the reason in llama_kv_mixed_last_error().
int32_t llama_kv_mixed_params_parse(const char * spec, struct llama_kv_mixed_params * params);

// Writes a spec that is read back to the same parameters: hot, cold, and what is not the default. Returns its length; size bytes
// of buf get as much of it as fits, and a 0. Returns -1 with the reason as above when the parameters are not valid.
int32_t llama_kv_mixed_params_format(const struct llama_kv_mixed_params * params, char * buf, size_t size);

// What contexts are to have that llama_init_from_model() makes from now on, in this process, in place of what the variable
// LLAMA_KV_MIXED says: a spec. NULL: what the variable says again. To be called before threads that make contexts.
// Returns 0; or -1 with the reason as above, and nothing changed.
int32_t llama_kv_mixed_set_default(const char * spec);

// Whether a context that llama_init_from_model() makes now would have a mixed cache: 1 or 0; or -1 when the spec is wrong, with the
// reason as above.
int32_t llama_kv_mixed_get_default(struct llama_kv_mixed_params * params);

// A preset: parameters that have a name.
struct llama_kv_mixed_preset {
    size_t struct_size;

    const char * name;
    const char * what; // what it is good for
    const char * spec; // its parameters that are not the defaults
};

// The i-th preset of this library. Returns 0; or -1 when there is none.
int32_t llama_kv_mixed_get_preset(uint32_t i, struct llama_kv_mixed_preset * preset);

// llama_init_from_model() with a mixed KV cache. params == NULL: without one, whatever LLAMA_KV_MIXED and llama_kv_mixed_set_default() say.
// Returns NULL on failure, with the reason in llama_kv_mixed_last_error().
struct llama_context * llama_kv_mixed_init_from_model(
        struct llama_model * model,
        struct llama_context_params cparams,
        const struct llama_kv_mixed_params * params);

// One sentence about the last failure of this interface on the calling thread; "" when there was none.
const char * llama_kv_mixed_last_error(void);

// The parameters in force and the state of a cache, of llama_get_memory() or llama_kv_mixed_cache_get_memory().
// Return 0; or -1 when the memory is not a mixed KV cache and has none in it, with the reason in llama_kv_mixed_last_error().
int32_t llama_kv_mixed_get_params(llama_memory_t mem, struct llama_kv_mixed_params * params);
int32_t llama_kv_mixed_get_stats (llama_memory_t mem, struct llama_kv_mixed_stats * stats);

// How many tokens of a sequence are hot, and how many are cold. Returns 0; or -1 as above, and when there is no such sequence.
int32_t llama_kv_mixed_get_seq_use(llama_memory_t mem, int32_t seq_id, uint32_t * n_hot, uint32_t * n_cold);

// A format: a way in which rows of K or V are stored.
struct llama_kv_mixed_format_info {
    size_t struct_size;

    const char * name;  // what cold=, cold_k= and cold_v= call it
    int32_t  type;      // enum ggml_type of the tensors that hold the rows
    uint32_t n_block;   // values that are stored together: heads must be multiples of it
    uint64_t size_block; // bytes of these

    int32_t is_hot;     // 1: new tokens may be stored like this as well
    int32_t is_direct;  // 1: on the CPU a token that is decoded meets the rows as they are stored, 0: expanded ones
    int32_t is_fused;   // 1: on the CPU the rows of tokens that become cold are rotated and stored in one pass
};

// The i-th format of this library. Returns 0; or -1 when there is none.
int32_t llama_kv_mixed_get_format_info(uint32_t i, struct llama_kv_mixed_format_info * info);

// What one layer of a model keeps of a token.
struct llama_kv_mixed_layer {
    size_t struct_size;

    uint32_t n_head_kv;     // 0: nothing, it is recurrent or uses the rows of another layer
    uint32_t n_embd_head_k;
    uint32_t n_embd_head_v; // 0: V is part of K

    int32_t is_swa;         // only of the tokens in its sliding window
};

// Returns 0; or -1 when the model has no such layer, with the reason as above.
int32_t llama_kv_mixed_get_layer(const struct llama_model * model, uint32_t il, struct llama_kv_mixed_layer * layer);

// sizeof of a struct that crosses this interface by value, by its name ("llama_batch"); 0 when the name is unknown.
// Lets bindings compare their layout with the library's.
size_t llama_kv_mixed_sizeof(const char * name);

//
// trace: what a cache does, as records in a bounded ring
//

enum llama_kv_mixed_event_kind {
    LLAMA_KV_MIXED_EVENT_INIT        = 0, // tracing begins
    LLAMA_KV_MIXED_EVENT_TRIGGER     = 1, // a migration is called for
    LLAMA_KV_MIXED_EVENT_MIGRATE     = 2, // tokens were moved from hot to cold
    LLAMA_KV_MIXED_EVENT_FAIL        = 3, // the copy failed, the tokens stay hot
    LLAMA_KV_MIXED_EVENT_REFUSE      = 4, // tokens do not fit in hot and cold
    LLAMA_KV_MIXED_EVENT_CLEAR       = 5,
    LLAMA_KV_MIXED_EVENT_SEQ_RM      = 6,
    LLAMA_KV_MIXED_EVENT_SEQ_CP      = 7,
    LLAMA_KV_MIXED_EVENT_SEQ_KEEP    = 8,
    LLAMA_KV_MIXED_EVENT_SEQ_ADD     = 9,
    LLAMA_KV_MIXED_EVENT_SEQ_DIV     = 10,
    LLAMA_KV_MIXED_EVENT_STATE_WRITE = 11,
    LLAMA_KV_MIXED_EVENT_STATE_READ  = 12,
};

enum llama_kv_mixed_trigger {
    LLAMA_KV_MIXED_TRIGGER_THRESHOLD = 0, // hot use passed the threshold
    LLAMA_KV_MIXED_TRIGGER_ROOM      = 1, // new tokens need the cells
    LLAMA_KV_MIXED_TRIGGER_MANUAL    = 2, // llama_kv_mixed_cache_move_to_cold()
};

struct llama_kv_mixed_event {
    uint64_t id;        // 0, 1, 2, ... since tracing began; gaps are records that were dropped
    int64_t  t_us;      // monotonic time, microseconds
    int64_t  dur_us;    // time taken, microseconds
    int32_t  kind;      // enum llama_kv_mixed_event_kind
    int32_t  trigger;   // enum llama_kv_mixed_trigger; -1 for other kinds than TRIGGER and MIGRATE
    int32_t  strm;      // stream, -1: all
    int32_t  pos_min;   // TRIGGER, MIGRATE, FAIL: the positions that move, both inclusive
    int32_t  pos_max;   // SEQ_RM, _CP, _ADD, _DIV: p0 and p1 as the caller gave them, [p0, p1); other kinds: -1
    uint32_t n_tokens;  // tokens concerned
    uint32_t hot_used;  // cells of the stream after the event
    uint32_t hot_size;
    uint32_t cold_used;
    uint32_t cold_size;
    uint64_t bytes_in;  // bytes of the rows before and after a migration
    uint64_t bytes_out;
    uint64_t seqs[4];   // bit s of the 256: sequence s is concerned
    float    rmse_k;    // quantisation error of the rows that moved, over all layers; NaN when it was not measured
    float    max_k;
    float    rmse_v;
    float    max_v;
    float    rms_k;     // of the values before: what the error is to be compared with
    float    rms_v;
};

// the quantisation error of one layer in a migration
struct llama_kv_mixed_layer_error {
    uint64_t id;        // the event's
    int32_t  il;
    float    rmse_k;
    float    max_k;
    float    rmse_v;
    float    max_v;
    float    rms_k;     // of the values before
    float    rms_v;
};

enum llama_kv_mixed_trace_flags {
    LLAMA_KV_MIXED_TRACE_LOG    = 1, // also write the records to llama.cpp's log, as text
    LLAMA_KV_MIXED_TRACE_ERROR  = 2, // measure the quantisation error of what moves
    LLAMA_KV_MIXED_TRACE_LAYERS = 4, // keep it by layer as well
};

// Begins a trace that keeps the newest n_max records; n_max == 0 ends it. Return 0; or -1 when mem is not a mixed KV cache.
int32_t llama_kv_mixed_trace_start(llama_memory_t mem, uint32_t n_max, uint32_t flags);

// Takes up to n_max records, oldest first, and returns their number; *n_dropped: how many the ring lost since it began.
// May be called from another thread than the one that decodes.
uint32_t llama_kv_mixed_trace_read       (llama_memory_t mem, struct llama_kv_mixed_event * events, uint32_t n_max, uint64_t * n_dropped);
uint32_t llama_kv_mixed_trace_read_layers(llama_memory_t mem, struct llama_kv_mixed_layer_error * errors, uint32_t n_max);

//
// a cache driven by hand: no model file, no decode
//

// What a cache needs to know about a model.
struct llama_kv_mixed_shape {
    size_t   struct_size;

    uint32_t n_layer;
    uint32_t n_head_kv;
    uint32_t n_embd_head_k;
    uint32_t n_embd_head_v;
    uint32_t n_ctx;         // tokens that one stream must be able to hold; 0: as many as n_hot + n_cold are
    uint32_t n_seq_max;
    uint32_t n_pad;         // cell counts are multiples of this, 0: 1
    uint32_t unified;       // 1: one stream for all sequences, 0: one each
    int32_t  type_k;        // enum ggml_type of hot rows
    int32_t  type_v;
};

// One of the two caches.
struct llama_kv_mixed_tier {
    size_t   struct_size;

    uint32_t n_stream;
    uint32_t size;          // cells per stream
    uint32_t n_layer;
    int32_t  type_k;        // enum ggml_type
    int32_t  type_v;
    uint32_t n_embd_head_k;
    uint32_t n_embd_head_v;
    uint32_t n_head_kv;
    uint64_t row_size_k;    // bytes of one cell's K in one layer
    uint64_t row_size_v;
    uint32_t n_page;        // pages of 128 cells per stream whose K rows are stored less their mean, 0: rows are stored as they are
};

// A cell: its position (-1: empty), the position shift that is still to be applied, and its sequences.
struct llama_kv_mixed_cell {
    int32_t  pos;
    int32_t  shift;
    uint64_t seqs[4];
};

// Tokens as the cache gets them, see llama_ubatch. The pointers live as long as their sbatch.
struct llama_kv_mixed_ubatch {
    size_t struct_size;

    uint32_t index;         // for find_slot
    uint32_t n_tokens;
    uint32_t n_seq_tokens;
    uint32_t n_seqs;
    uint32_t n_seqs_unq;
    uint32_t equal_seqs;

    const int32_t * token;     // [n_tokens]
    const int32_t * pos;       // [n_tokens]
    const int32_t * n_seq_id;  // [n_tokens]
    int32_t * const * seq_id;  // [n_tokens][n_seq_id]
    const int8_t  * output;    // [n_tokens]
};

struct llama_kv_mixed_cache;
struct llama_kv_mixed_sbatch;

enum llama_kv_mixed_tier_id {
    LLAMA_KV_MIXED_HOT  = 0,
    LLAMA_KV_MIXED_COLD = 1,
};

enum llama_kv_mixed_split {
    LLAMA_KV_MIXED_SPLIT_SIMPLE = 0,
    LLAMA_KV_MIXED_SPLIT_EQUAL  = 1,
    LLAMA_KV_MIXED_SPLIT_SEQ    = 2,
};

// A cache of its own. params == NULL: a plain llama_kv_cache of n_ctx cells, which is then the hot tier.
// Returns NULL on failure, with the reason in llama_kv_mixed_last_error(); so do all functions below that return -1.
struct llama_kv_mixed_cache * llama_kv_mixed_cache_init(const struct llama_kv_mixed_shape * shape, const struct llama_kv_mixed_params * params);

// The mixed cache of a context, which must outlive the result.
struct llama_kv_mixed_cache * llama_kv_mixed_cache_from_context(struct llama_context * ctx);

void llama_kv_mixed_cache_free(struct llama_kv_mixed_cache * cache);

// for llama_memory_seq_rm() and its like
llama_memory_t llama_kv_mixed_cache_get_memory(struct llama_kv_mixed_cache * cache);

int32_t llama_kv_mixed_cache_get_tier(const struct llama_kv_mixed_cache * cache, int32_t tier, struct llama_kv_mixed_tier * info);

// The stream that holds a sequence; -1 when there is no such sequence.
int32_t llama_kv_mixed_cache_get_stream(const struct llama_kv_mixed_cache * cache, int32_t seq_id);

// All cells of a stream: cells [size].
int32_t llama_kv_mixed_cache_get_cells(const struct llama_kv_mixed_cache * cache, int32_t tier, uint32_t strm, struct llama_kv_mixed_cell * cells);

// Rows [cell, cell + n) of a layer's K (v == 0) or V (v == 1), n*row_size bytes.
int32_t llama_kv_mixed_cache_get_rows(const struct llama_kv_mixed_cache * cache, int32_t tier, uint32_t il, int32_t v, uint32_t strm, uint32_t cell, uint32_t n, void * dst);
int32_t llama_kv_mixed_cache_set_rows(      struct llama_kv_mixed_cache * cache, int32_t tier, uint32_t il, int32_t v, uint32_t strm, uint32_t cell, uint32_t n, const void * src);

// The means of K in pages [page, page + n) of cold: n*n_head_kv*n_embd_head_k values of F16, rotated as the rows are.
int32_t llama_kv_mixed_cache_get_means(const struct llama_kv_mixed_cache * cache, uint32_t il, uint32_t strm, uint32_t page, uint32_t n, void * dst);
int32_t llama_kv_mixed_cache_set_means(      struct llama_kv_mixed_cache * cache, uint32_t il, uint32_t strm, uint32_t page, uint32_t n, const void * src);

// A batch made consistent, ready to be split; see llama_batch_allocr. mem may be NULL: positions are then not held against
// those in a cache.
struct llama_kv_mixed_sbatch * llama_kv_mixed_sbatch_init(struct llama_batch batch, uint32_t n_seq_max, uint32_t n_vocab, llama_memory_t mem);
void    llama_kv_mixed_sbatch_free (struct llama_kv_mixed_sbatch * sbatch);
void    llama_kv_mixed_sbatch_reset(struct llama_kv_mixed_sbatch * sbatch);

// The next ubatch of up to n_ubatch tokens. Returns its number of tokens, 0 when the batch is used up.
int32_t llama_kv_mixed_sbatch_split(struct llama_kv_mixed_sbatch * sbatch, int32_t split, uint32_t n_ubatch, struct llama_kv_mixed_ubatch * ubatch);

// Finds places in hot for a ubatch, after migrations when there is no room, and remembers them for commit; cells [n_tokens]
// gets their indices (may be NULL). No token is added. Returns 0; 1 when hot and cold are full, and nothing has changed.
int32_t llama_kv_mixed_cache_find_slot(struct llama_kv_mixed_cache * cache, struct llama_kv_mixed_sbatch * sbatch, uint32_t index, uint32_t * cells);

// Adds the tokens that a slot was found for, and migrates once when that passed the threshold; or forgets the slot.
int32_t llama_kv_mixed_cache_commit  (struct llama_kv_mixed_cache * cache);
int32_t llama_kv_mixed_cache_rollback(struct llama_kv_mixed_cache * cache);

// Moves the n oldest tokens of a stream that are not pinned. Returns how many were moved, fewer when cold is full.
int32_t llama_kv_mixed_cache_move_to_cold(struct llama_kv_mixed_cache * cache, uint32_t strm, uint32_t n);

// The state of a sequence (-1: all) as bytes. dst == NULL asks for the size. Return the number of bytes; or -1.
int64_t llama_kv_mixed_cache_state_get(const struct llama_kv_mixed_cache * cache, int32_t seq_id, void * dst, size_t size);
int64_t llama_kv_mixed_cache_state_set(struct llama_kv_mixed_cache * cache, int32_t seq_id, const void * src, size_t size);

//
// attention on the CPU, for tests and tools
//

// Cells of one cache; a cell holds one row for each KV head
struct llama_kv_mixed_attn_segment {
    const void * k;
    const void * v;

    int32_t type_k; // enum ggml_type
    int32_t type_v;

    int64_t n_kv;   // cells, may be 0

    // bytes from one KV head, cell, stream to the next; as the addresses, even where rows are quantised
    size_t nb_k[3];
    size_t nb_v[3];
};

// softmax(scale Q K^T + mask) V over the cells of two caches, as ggml_flash_attn_ext() defines it.
struct llama_kv_mixed_attn_args {
    size_t struct_size;

    int64_t n_embd_k;  // head sizes
    int64_t n_embd_v;
    int64_t n_head;
    int64_t n_head_kv; // divides n_head
    int64_t n_tokens;  // of one stream
    int64_t n_stream;

    const float * q;   // n_embd_k values per head, token, stream
    size_t nb_q[3];    // bytes from one head, token, stream to the next

    struct llama_kv_mixed_attn_segment seg[2]; // cold, hot

    // Rows of seg[0] are rotated by the orthonormal Walsh-Hadamard matrix, in blocks of so many values of a head: a power of
    // 2 from 16; 0: they are not
    int64_t n_rot_k;
    int64_t n_rot_v;

    const void * mask; // cells of seg[0], then those of seg[1]; f16 or f32; null: nothing is masked
    bool mask_f16;
    size_t nb_mask[2]; // bytes from one token, stream to the next

    const float * sinks; // one logit per head, null: none

    float scale;
    float logit_softcap; // 0: none
    float max_bias;      // ALiBi, 0: none

    float * dst;         // [n_stream][n_tokens][n_head][n_embd_v]

    // Rows of K in seg[0] are stored less the mean of their page: n_embd_k values of F16, rotated as the rows are, for each KV
    // head, page of 128 cells, stream; nb_k_mean: bytes from one of these to the next. null: they are stored as they are
    const void * k_mean;
    size_t nb_k_mean[3];

    // The share of a query row's weights that cells of seg[0] may have together whose V is left unread: each has no more than
    // v_skip/n of the row's total, n being all cells. For few query rows, and where seg[0] has more cells than seg[1], which it
    // can not do without. 0: all is read
    float v_skip;
};

// Computes args->dst on so many threads, or on those that can be started. isa: the instruction set, NULL for the best one that this machine has.
// Returns 0; or -1 with the reason in llama_kv_mixed_last_error().
int32_t llama_kv_mixed_attn(const struct llama_kv_mixed_attn_args * args, int32_t n_threads, const char * isa);

// n_rows contiguous rows of n values as a migration on the CPU stores them: rotated as above in blocks of n_rot values, a power
// of 2 from 32 to 1024, 0: not; then quantised. From f32, f16, bf16 to q4_0, q8_0. Returns 0; or -1 with the reason as above.
int32_t llama_kv_mixed_quantize(
        const void * src, int32_t type_src, void * dst, int32_t type_dst, int64_t n_rows, int64_t n, int64_t n_rot, const char * isa);

// The instruction sets that can be asked for on this machine, best first, separated by spaces.
const char * llama_kv_mixed_attn_isas(void);
