// A device for tests, as a backend that ggml loads: a GPU as far as libllama can tell, with memory of its own.
//
// It computes by the CPU's backend, so its results are the CPU's. Its memory is closed while it neither computes nor
// copies: who takes an address in it for one of the host's memory is ended by the system at once. It has no custom
// operations, nor those that own_memory_refuse() names; a graph that has one all the same fails. It can be made to
// claim that it has custom operations (own_memory_claim_custom()), as an RPC server does.
//
// ggml's functions are those of the process that loads it, whose libggml must be open to all (RTLD_GLOBAL).

#include "ggml-backend-impl.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>

static ggml_backend_device * get_device();

//
// memory
//

static std::mutex               mutex;
static std::map<void *, size_t> regions;

static void protect(int prot) {
    for (const auto & [data, size] : regions) {
        GGML_ASSERT(mprotect(data, size, prot) == 0);
    }
}

// the memory is open while one of these lives
struct opened {
    std::lock_guard<std::mutex> lock{mutex};

    opened()  { protect(PROT_READ | PROT_WRITE); }
    ~opened() { protect(PROT_NONE); }
};

static void * get_base(ggml_backend_buffer_t buffer) {
    return buffer->context;
}

static void free_buffer(ggml_backend_buffer_t buffer) {
    const opened memory;

    munmap(buffer->context, regions.at(buffer->context));
    regions.erase(buffer->context);
}

static void memset_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    const opened memory;

    memset((char *) tensor->data + offset, value, size);
}

static void set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    const opened memory;

    memcpy((char *) tensor->data + offset, data, size);
}

static void get_tensor(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    const opened memory;

    memcpy(data, (const char *) tensor->data + offset, size);
}

static void clear(ggml_backend_buffer_t buffer, uint8_t value) {
    const opened memory;

    memset(buffer->context, value, buffer->size);
}

static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    const opened memory;

    void * data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
        return nullptr;
    }
    regions[data] = size;

    ggml_backend_buffer_i iface = {};
    iface.free_buffer   = free_buffer;
    iface.get_base      = get_base;
    iface.memset_tensor = memset_tensor;
    iface.set_tensor    = set_tensor;
    iface.get_tensor    = get_tensor;
    iface.clear         = clear;

    return ggml_backend_buffer_init(buft, iface, data, size);
}

static ggml_backend_buffer_type_t get_buffer_type(ggml_backend_dev_t) {
    static ggml_backend_buffer_type res = [] {
        ggml_backend_buffer_type_i iface = {};
        iface.get_name      = [](ggml_backend_buffer_type_t) { return "OwnMemory"; };
        iface.alloc_buffer  = alloc_buffer;
        iface.get_alignment = [](ggml_backend_buffer_type_t) -> size_t { return 64; };
        iface.is_host       = [](ggml_backend_buffer_type_t) { return false; };

        return ggml_backend_buffer_type{ iface, get_device(), nullptr };
    }();

    return &res;
}

//
// operations
//

static std::set<std::string> refused;

static bool claims_custom = false;

extern "C" void own_memory_claim_custom(bool claims) {
    claims_custom = claims;
}

// what: operations with the types of their first source and of their result, "CPY q4_0 f32, SET_ROWS f32 q8_0"
extern "C" void own_memory_refuse(const char * what) {
    refused.clear();

    std::istringstream is(what);
    for (std::string item; std::getline(is >> std::ws, item, ',');) {
        refused.insert(item);
    }
}

static bool is_custom(const ggml_tensor * op) {
    return op->op == GGML_OP_CUSTOM || (op->op >= GGML_OP_MAP_CUSTOM1 && op->op <= GGML_OP_MAP_CUSTOM3);
}

static bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    if (is_custom(op)) {
        return claims_custom;
    }
    if (op->src[0]) {
        const std::string source = ggml_type_name(op->src[0]->type);
        if (refused.count(ggml_op_name(op->op) + (" " + source + " ") + ggml_type_name(op->type)) > 0) {
            return false;
        }
    }

    return ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), op);
}

static ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (is_custom(node) || !supports_op(backend->device, node)) {
            fprintf(stderr, "the device is given %s (%s), which it does not have\n", ggml_op_desc(node), node->name);
            return GGML_STATUS_FAILED;
        }
    }

    const opened memory;

    return ggml_backend_graph_compute((ggml_backend_t) backend->context, graph);
}

static ggml_backend_t init_backend(ggml_backend_dev_t dev, const char *) {
    static uint8_t guid[16] = "own-memory-test";

    ggml_backend_i iface = {};
    iface.get_name      = [](ggml_backend_t) { return "OwnMemory"; };
    iface.free          = [](ggml_backend_t backend) {
        ggml_backend_free((ggml_backend_t) backend->context);
        delete backend;
    };
    iface.graph_compute = graph_compute;

    ggml_backend_t cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);

    auto * set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
            ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu)), "ggml_backend_set_n_threads");
    set_n_threads(cpu, 1);

    return new ggml_backend{ &guid, iface, dev, cpu };
}

//
// the device
//

static void get_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free = *total = (size_t) 1 << 30;
}

static void get_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props = {};
    props->name        = ggml_backend_dev_name(dev);
    props->description = ggml_backend_dev_description(dev);
    props->type        = ggml_backend_dev_type(dev);
    get_memory(dev, &props->memory_free, &props->memory_total);
}

static ggml_backend_reg_t get_reg() {
    static ggml_backend_reg res = [] {
        ggml_backend_reg_i iface = {};
        iface.get_name         = [](ggml_backend_reg_t) { return "OwnMemory"; };
        iface.get_device_count = [](ggml_backend_reg_t) -> size_t { return 1; };
        iface.get_device       = [](ggml_backend_reg_t, size_t) -> ggml_backend_dev_t { return get_device(); };

        return ggml_backend_reg{ GGML_BACKEND_API_VERSION, iface, nullptr };
    }();

    return &res;
}

static ggml_backend_device * get_device() {
    static ggml_backend_device res = [] {
        ggml_backend_device_i iface = {};
        iface.get_name        = [](ggml_backend_dev_t) { return "OwnMemory0"; };
        iface.get_description = [](ggml_backend_dev_t) { return "a device for tests"; };
        iface.get_memory      = get_memory;
        iface.get_type        = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
        iface.get_props       = get_props;
        iface.init_backend    = init_backend;
        iface.get_buffer_type = get_buffer_type;
        iface.supports_op     = supports_op;
        iface.supports_buft   = [](ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
            return buft == get_buffer_type(dev);
        };

        return ggml_backend_device{ iface, get_reg(), nullptr };
    }();

    return &res;
}

extern "C" ggml_backend_reg_t ggml_backend_init(void) {
    return get_reg();
}
