// The part of libggml's C interface that copies between types and ggml's own attention are computed with.
// Plain declarations only, no preprocessor.
// Upstream's headers (ggml.h, ggml-backend.h) are the original; enums are written as int32_t here.

struct ggml_context;
struct ggml_tensor;
struct ggml_cgraph;

typedef struct ggml_backend        * ggml_backend_t;
typedef struct ggml_backend_buffer * ggml_backend_buffer_t;
typedef struct ggml_backend_device * ggml_backend_dev_t;
typedef struct ggml_backend_reg    * ggml_backend_reg_t;

struct ggml_init_params {
    size_t mem_size;
    void * mem_buffer;
    bool   no_alloc;
};

size_t ggml_type_size(int32_t type);

// graphs

size_t ggml_tensor_overhead(void);
size_t ggml_graph_overhead_custom(size_t size, bool grads);

struct ggml_context * ggml_init(struct ggml_init_params params);
void                  ggml_free(struct ggml_context * ctx);

struct ggml_tensor * ggml_new_tensor(struct ggml_context * ctx, int32_t type, int n_dims, const int64_t * ne);
struct ggml_tensor * ggml_cpy       (struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);

struct ggml_tensor * ggml_permute(struct ggml_context * ctx, struct ggml_tensor * a, int axis0, int axis1, int axis2, int axis3);

struct ggml_tensor * ggml_flash_attn_ext(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * mask,
        float                 scale,
        float                 max_bias,
        float                 logit_softcap);

void ggml_flash_attn_ext_add_sinks(struct ggml_tensor * a, struct ggml_tensor * sinks);

void * ggml_get_data(const struct ggml_tensor * tensor);

struct ggml_cgraph * ggml_new_graph_custom(struct ggml_context * ctx, size_t size, bool grads);
void                 ggml_build_forward_expand(struct ggml_cgraph * cgraph, struct ggml_tensor * tensor);

// backends

ggml_backend_t     ggml_backend_init_by_type (int32_t type, const char * params);
void               ggml_backend_free         (ggml_backend_t backend);
ggml_backend_dev_t ggml_backend_get_device   (ggml_backend_t backend);
int32_t            ggml_backend_graph_compute(ggml_backend_t backend, struct ggml_cgraph * cgraph);

ggml_backend_reg_t ggml_backend_dev_backend_reg(ggml_backend_dev_t device);

void * ggml_backend_reg_get_proc_address(ggml_backend_reg_t reg, const char * name);

ggml_backend_buffer_t ggml_backend_alloc_ctx_tensors(struct ggml_context * ctx, ggml_backend_t backend);
void                  ggml_backend_buffer_free      (ggml_backend_buffer_t buffer);

void ggml_backend_tensor_set(      struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);
void ggml_backend_tensor_get(const struct ggml_tensor * tensor,       void * data, size_t offset, size_t size);

// what there is to compute with

size_t             ggml_backend_reg_dev_count(ggml_backend_reg_t reg);
ggml_backend_dev_t ggml_backend_reg_dev_get  (ggml_backend_reg_t reg, size_t index);
ggml_backend_reg_t ggml_backend_reg_get      (size_t index);
ggml_backend_reg_t ggml_backend_reg_by_name  (const char * name);
const char *       ggml_backend_reg_name     (ggml_backend_reg_t reg);

size_t             ggml_backend_dev_count      (void);
ggml_backend_dev_t ggml_backend_dev_get        (size_t index);
const char *       ggml_backend_dev_description(ggml_backend_dev_t device);
int32_t            ggml_backend_dev_type       (ggml_backend_dev_t device);

// metadata of GGUF files (gguf.h)

struct gguf_context;

struct gguf_init_params {
    bool                   no_alloc;
    struct ggml_context ** ctx;
};

struct gguf_context * gguf_init_from_file(const char * fname, struct gguf_init_params params);
void                  gguf_free          (struct gguf_context * ctx);

size_t  gguf_get_data_offset(const struct gguf_context * ctx);
int64_t gguf_find_key       (const struct gguf_context * ctx, const char * key);

int32_t gguf_get_kv_type (const struct gguf_context * ctx, int64_t key_id);
int32_t gguf_get_arr_type(const struct gguf_context * ctx, int64_t key_id);

const void * gguf_get_val_data(const struct gguf_context * ctx, int64_t key_id);
const char * gguf_get_val_str (const struct gguf_context * ctx, int64_t key_id);
size_t       gguf_get_arr_n   (const struct gguf_context * ctx, int64_t key_id);
const void * gguf_get_arr_data(const struct gguf_context * ctx, int64_t key_id);

int64_t gguf_get_n_tensors    (const struct gguf_context * ctx);
size_t  gguf_get_tensor_offset(const struct gguf_context * ctx, int64_t tensor_id);
size_t  gguf_get_tensor_size  (const struct gguf_context * ctx, int64_t tensor_id);
