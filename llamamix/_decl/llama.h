// The part of libllama's and libggml's C interface that the bindings call: plain declarations only, no preprocessor.
// Upstream's headers (llama.h, ggml.h, ggml-backend.h) are the original; enums are written as int32_t here.
// The sizes of the structs are compared with the library's when it is loaded.

struct llama_vocab;
struct llama_model;
struct llama_context;
struct llama_sampler;

typedef struct llama_memory_i * llama_memory_t;

struct llama_batch {
    int32_t n_tokens;

    int32_t  *  token;
    float    *  embd;
    int32_t  *  pos;
    int32_t  *  n_seq_id;
    int32_t  ** seq_id;
    int8_t   *  logits;
};

struct llama_model_params {
    void ** devices;
    void *  tensor_buft_overrides;

    int32_t n_gpu_layers;
    int32_t split_mode;
    int32_t load_mode;
    int32_t lazy_mode;
    int32_t main_gpu;

    const float * tensor_split;

    void * progress_callback;
    void * progress_callback_user_data;
    void * kv_overrides;

    bool vocab_only;
    bool check_tensors;
    bool use_extra_bufts;
    bool no_host;
    bool no_alloc;
    bool load_mtp;
};

struct llama_context_params {
    uint32_t n_ctx;
    uint32_t n_batch;
    uint32_t n_ubatch;
    uint32_t n_seq_max;
    uint32_t n_rs_seq;
    uint32_t n_outputs_max;
    uint32_t n_outputs_max_per_seq;
    int32_t  n_threads;
    int32_t  n_threads_batch;

    int32_t ctx_type;
    int32_t rope_scaling_type;
    int32_t pooling_type;
    int32_t attention_type;
    int32_t flash_attn_type;

    float    rope_freq_base;
    float    rope_freq_scale;
    float    yarn_ext_factor;
    float    yarn_attn_factor;
    float    yarn_beta_fast;
    float    yarn_beta_slow;
    uint32_t yarn_orig_ctx;
    float    defrag_thold;

    void * cb_eval;
    void * cb_eval_user_data;

    int32_t type_k;
    int32_t type_v;

    void * abort_callback;
    void * abort_callback_data;

    bool embeddings;
    bool offload_kqv;
    bool no_perf;
    bool op_offload;
    bool swa_full;
    bool kv_unified;

    void * samplers;
    size_t n_samplers;

    struct llama_context * ctx_other;
};

struct llama_model_quantize_params {
    int32_t nthread;
    int32_t ftype;
    int32_t output_tensor_type;
    int32_t token_embedding_type;

    bool allow_requantize;
    bool quantize_output_tensor;
    bool only_copy;
    bool pure;
    bool keep_split;
    bool dry_run;

    const void *    imatrix;
    const void *    kv_overrides;
    const void *    tt_overrides;
    const int32_t * prune_layers;

    size_t max_buf_size;
};

struct llama_sampler_chain_params {
    bool no_perf;
};

struct llama_perf_context_data {
    double t_start_ms;
    double t_load_ms;
    double t_p_eval_ms;
    double t_eval_ms;

    int32_t n_p_eval;
    int32_t n_eval;
    int32_t n_reused;
};

struct llama_chat_message {
    const char * role;
    const char * content;
};

struct llama_token_data {
    int32_t id;
    float   logit;
    float   p;
};

struct llama_token_data_array {
    struct llama_token_data * data;
    size_t  size;
    int64_t selected;
    bool    sorted;
};

struct llama_logit_bias {
    int32_t token;
    float   bias;
};

// library

void llama_backend_init(void);
const char * llama_print_system_info(void);
void llama_log_set(void (*log_callback)(int32_t level, const char * text, void * user_data), void * user_data);

const char * ggml_type_name(int32_t type);
int64_t      ggml_blck_size(int32_t type);
size_t       ggml_backend_reg_count(void);
void         ggml_backend_load_all_from_path(const char * dir_path);

// model

struct llama_model_params llama_model_default_params(void);

struct llama_model * llama_model_load_from_file(const char * path_model, struct llama_model_params params);
void                 llama_model_free(struct llama_model * model);

const struct llama_vocab * llama_model_get_vocab(const struct llama_model * model);

int32_t  llama_model_rope_type  (const struct llama_model * model);
int32_t  llama_model_n_ctx_train(const struct llama_model * model);
int32_t  llama_model_n_embd     (const struct llama_model * model);
int32_t  llama_model_n_embd_out (const struct llama_model * model);
int32_t  llama_model_n_layer    (const struct llama_model * model);
int32_t  llama_model_n_head     (const struct llama_model * model);
int32_t  llama_model_n_head_kv  (const struct llama_model * model);
int32_t  llama_model_n_swa      (const struct llama_model * model);
uint32_t llama_model_n_cls_out  (const struct llama_model * model);
uint64_t llama_model_size       (const struct llama_model * model);
uint64_t llama_model_n_params   (const struct llama_model * model);
bool     llama_model_has_encoder (const struct llama_model * model);
bool     llama_model_is_recurrent(const struct llama_model * model);
bool     llama_model_is_hybrid   (const struct llama_model * model);

int32_t llama_model_meta_count           (const struct llama_model * model);
int32_t llama_model_meta_key_by_index    (const struct llama_model * model, int32_t i, char * buf, size_t buf_size);
int32_t llama_model_meta_val_str_by_index(const struct llama_model * model, int32_t i, char * buf, size_t buf_size);
int32_t llama_model_desc                 (const struct llama_model * model, char * buf, size_t buf_size);

const char * llama_model_chat_template(const struct llama_model * model, const char * name);

int32_t llama_chat_apply_template(
        const char * tmpl,
        const struct llama_chat_message * chat,
        size_t  n_msg,
        bool    add_ass,
        char *  buf,
        int32_t length);

struct llama_model_quantize_params llama_model_quantize_default_params(void);

uint32_t llama_model_quantize(
        const char * fname_inp,
        const char * fname_out,
        const struct llama_model_quantize_params * params);

// vocab

bool    llama_vocab_get_add_bos(const struct llama_vocab * vocab);
bool    llama_vocab_get_add_eos(const struct llama_vocab * vocab);
int32_t llama_vocab_type    (const struct llama_vocab * vocab);
int32_t llama_vocab_n_tokens(const struct llama_vocab * vocab);
bool    llama_vocab_is_eog  (const struct llama_vocab * vocab, int32_t token);
int32_t llama_vocab_bos     (const struct llama_vocab * vocab);
int32_t llama_vocab_eos     (const struct llama_vocab * vocab);
int32_t llama_vocab_eot     (const struct llama_vocab * vocab);
int32_t llama_vocab_nl      (const struct llama_vocab * vocab);
int32_t llama_vocab_pad     (const struct llama_vocab * vocab);

int32_t llama_tokenize(
        const struct llama_vocab * vocab,
        const char * text,
        int32_t   text_len,
        int32_t * tokens,
        int32_t   n_tokens_max,
        bool      add_special,
        bool      parse_special);

int32_t llama_token_to_piece(
        const struct llama_vocab * vocab,
        int32_t token,
        char *  buf,
        int32_t length,
        int32_t lstrip,
        bool    special);

int32_t llama_detokenize(
        const struct llama_vocab * vocab,
        const int32_t * tokens,
        int32_t n_tokens,
        char *  text,
        int32_t text_len_max,
        bool    remove_special,
        bool    unparse_special);

// context

struct llama_context_params llama_context_default_params(void);

void llama_free(struct llama_context * ctx);

uint32_t llama_n_ctx          (const struct llama_context * ctx);
uint32_t llama_n_ctx_seq      (const struct llama_context * ctx);
uint32_t llama_n_batch        (const struct llama_context * ctx);
uint32_t llama_n_ubatch       (const struct llama_context * ctx);
uint32_t llama_n_seq_max      (const struct llama_context * ctx);
int32_t  llama_pooling_type   (const struct llama_context * ctx);
bool     llama_get_causal_attn(const struct llama_context * ctx);
int32_t  llama_n_threads      (struct llama_context * ctx);
int32_t  llama_n_threads_batch(struct llama_context * ctx);

void llama_set_n_threads(struct llama_context * ctx, int32_t n_threads, int32_t n_threads_batch);

void llama_set_abort_callback(struct llama_context * ctx, bool (*abort_callback)(void * data), void * data);

int32_t llama_decode(struct llama_context * ctx, struct llama_batch batch);
void    llama_synchronize(struct llama_context * ctx);

float * llama_get_logits        (struct llama_context * ctx);
float * llama_get_embeddings    (struct llama_context * ctx);
float * llama_get_embeddings_seq(struct llama_context * ctx, int32_t seq_id);

struct llama_perf_context_data llama_perf_context(const struct llama_context * ctx);
void llama_perf_context_reset(struct llama_context * ctx);

size_t llama_state_get_size    (struct llama_context * ctx);
size_t llama_state_get_data    (struct llama_context * ctx, uint8_t * dst, size_t size);
size_t llama_state_set_data    (struct llama_context * ctx, const uint8_t * src, size_t size);
size_t llama_state_seq_get_size(struct llama_context * ctx, int32_t seq_id);
size_t llama_state_seq_get_data(struct llama_context * ctx, uint8_t * dst, size_t size, int32_t seq_id);
size_t llama_state_seq_set_data(struct llama_context * ctx, const uint8_t * src, size_t size, int32_t seq_id);

// memory

llama_memory_t llama_get_memory(const struct llama_context * ctx);

void    llama_memory_clear      (llama_memory_t mem, bool data);
bool    llama_memory_seq_rm     (llama_memory_t mem, int32_t seq_id, int32_t p0, int32_t p1);
void    llama_memory_seq_cp     (llama_memory_t mem, int32_t seq_id_src, int32_t seq_id_dst, int32_t p0, int32_t p1);
void    llama_memory_seq_keep   (llama_memory_t mem, int32_t seq_id);
void    llama_memory_seq_add    (llama_memory_t mem, int32_t seq_id, int32_t p0, int32_t p1, int32_t delta);
void    llama_memory_seq_div    (llama_memory_t mem, int32_t seq_id, int32_t p0, int32_t p1, int d);
int32_t llama_memory_seq_pos_min(llama_memory_t mem, int32_t seq_id);
int32_t llama_memory_seq_pos_max(llama_memory_t mem, int32_t seq_id);
bool    llama_memory_can_shift  (llama_memory_t mem);

// sampling

struct llama_sampler_chain_params llama_sampler_chain_default_params(void);

struct llama_sampler * llama_sampler_chain_init(struct llama_sampler_chain_params params);
void                   llama_sampler_chain_add (struct llama_sampler * chain, struct llama_sampler * smpl);
void                   llama_sampler_apply     (struct llama_sampler * smpl, struct llama_token_data_array * cur_p);
void                   llama_sampler_accept    (struct llama_sampler * smpl, int32_t token);
void                   llama_sampler_reset     (struct llama_sampler * smpl);
void                   llama_sampler_free      (struct llama_sampler * smpl);

struct llama_sampler * llama_sampler_init_greedy    (void);
struct llama_sampler * llama_sampler_init_dist      (uint32_t seed);
struct llama_sampler * llama_sampler_init_top_k     (int32_t k);
struct llama_sampler * llama_sampler_init_top_p     (float p, size_t min_keep);
struct llama_sampler * llama_sampler_init_min_p     (float p, size_t min_keep);
struct llama_sampler * llama_sampler_init_typical   (float p, size_t min_keep);
struct llama_sampler * llama_sampler_init_temp_ext  (float t, float delta, float exponent);
struct llama_sampler * llama_sampler_init_xtc       (float p, float t, size_t min_keep, uint32_t seed);
struct llama_sampler * llama_sampler_init_top_n_sigma(float n);
struct llama_sampler * llama_sampler_init_mirostat  (int32_t n_vocab, uint32_t seed, float tau, float eta, int32_t m);
struct llama_sampler * llama_sampler_init_mirostat_v2(uint32_t seed, float tau, float eta);
struct llama_sampler * llama_sampler_init_dry       (
        const struct llama_vocab * vocab, float dry_multiplier, float dry_base, int32_t dry_allowed_length,
        int32_t dry_penalty_last_n, const char ** seq_breakers, size_t num_breakers);
struct llama_sampler * llama_sampler_init_penalties (
        int32_t n_vocab, int32_t penalty_last_n, float penalty_repeat, float penalty_freq, float penalty_present);
struct llama_sampler * llama_sampler_init_logit_bias(
        int32_t n_vocab, int32_t n_logit_bias, const struct llama_logit_bias * logit_bias);
struct llama_sampler * llama_sampler_init_grammar   (
        const struct llama_vocab * vocab, const char * grammar_str, const char * grammar_root);
