// A device for tests, as a backend that ggml loads: a GPU as far as libllama can tell, with memory of its own.
//
// It computes by the CPU's backend, so its results are the CPU's, and as late as it may: graphs wait until somebody waits
// for them, so that who does not waits in vain. Its memory is closed while it neither computes nor
// copies: who takes an address in it for one of the host's memory is ended by the system at once. It has no custom
// operations, nor those that own_memory_refuse() names; a graph that has one all the same fails. It can be made to
// claim that it has custom operations (own_memory_claim_custom()), as an RPC server does, and to have the kernels for CUDA,
// emulated (own_memory_emulate_cuda()). Where OWN_MEMORY_NODES is set, it
// says that it computes the mixed cache's attention nodes, but no other ones, and calls their host functions.
//
// ggml's functions are those of the process that loads it, whose libggml must be open to all (RTLD_GLOBAL).

#include "cuda_emulated.h"

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"
#include "ggml-impl.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <utility>

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

static size_t n_read = 0;

// bytes that went to the host since the last call
extern "C" size_t own_memory_n_read(void) {
    return std::exchange(n_read, 0);
}

static void get_tensor(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    const opened memory;

    n_read += size;
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
static bool emulates_cuda = false;

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

static std::map<int, int> n_emulated;

// whether it has the kernels for CUDA, emulated; counts of nodes start at 0
extern "C" void own_memory_emulate_cuda(bool emulates) {
    emulates_cuda = emulates;
    n_emulated.clear();
}

// nodes of a kind (enum llama_kv_mixed_op_kind) that it has computed by these
extern "C" int own_memory_n_emulated(int kind) {
    return n_emulated[kind];
}

static bool has_nodes() {
    return getenv("OWN_MEMORY_NODES") != nullptr;
}

// why a node of the mixed cache is not computed, null: it is
static const char * get_node_reason(ggml_backend_dev_t, const ggml_tensor * node) {
    if (emulates_cuda) {
        return kv_get_reason(node);
    }
    return node->op == GGML_OP_CUSTOM && node->type == GGML_TYPE_F32 ? nullptr : "this device computes attention nodes only";
}

static void * get_proc_address(ggml_backend_reg_t, const char * name) {
    return (has_nodes() || emulates_cuda) && strcmp(name, LLAMA_KV_MIXED_OP_REASON) == 0 ? (void *) get_node_reason : nullptr;
}

static bool is_custom(const ggml_tensor * op) {
    return op->op == GGML_OP_CUSTOM || (op->op >= GGML_OP_MAP_CUSTOM1 && op->op <= GGML_OP_MAP_CUSTOM3);
}

static bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    if (is_custom(op)) {
        return claims_custom || (emulates_cuda && !kv_get_reason(op));
    }
    if (op->src[0]) {
        const std::string source = ggml_type_name(op->src[0]->type);
        if (refused.count(ggml_op_name(op->op) + (" " + source + " ") + ggml_type_name(op->type)) > 0) {
            return false;
        }
    }

    return ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), op);
}

//
// what it has to do
//

// a graph that may change before it is computed: what a GPU is told at once is copied, data is not
struct task {
    std::map<const ggml_tensor *, ggml_tensor> tensors;

    ggml_context_ptr ctx;
    ggml_cgraph    * graph;

    explicit task(const ggml_cgraph * from) {
        const int n_nodes = from->n_nodes;

        for (int i = 0; i < n_nodes; ++i) {
            tensors[from->nodes[i]] = *from->nodes[i];
        }
        for (int i = 0; i < n_nodes; ++i) {
            ggml_tensor & node = tensors.at(from->nodes[i]);
            node.view_src = keep(node.view_src);
            for (ggml_tensor * & src : node.src) {
                src = keep(src);
            }
        }

        const size_t size = n_nodes*(GGML_MAX_SRC + 2);
        ctx.reset(ggml_init({ ggml_graph_overhead_custom(size, false), nullptr, true }));
        graph = ggml_new_graph_custom(ctx.get(), size, false);

        for (int i = 0; i < n_nodes; ++i) {
            ggml_build_forward_expand(graph, &tensors.at(from->nodes[i]));
        }
        GGML_ASSERT(graph->n_nodes == n_nodes);

        // as in the whole graph, of which this may be a part
        for (int i = 0; i < n_nodes; ++i) {
            graph->use_counts[ggml_hash_find(&graph->visited_hash_set, graph->nodes[i])] =
                from->use_counts[ggml_hash_find(&from->visited_hash_set, from->nodes[i])];
        }
    }

    // what is none of the nodes is data
    ggml_tensor * keep(const ggml_tensor * t) {
        if (!t) {
            return nullptr;
        }
        const auto [it, is_new] = tensors.emplace(t, *t);
        if (is_new) {
            it->second.op       = GGML_OP_NONE;
            it->second.view_src = nullptr;
            std::fill(std::begin(it->second.src), std::end(it->second.src), nullptr);
        }
        return &it->second;
    }
};

struct queue {
    ggml_backend_t                   cpu;
    std::list<std::function<void()>> tasks;
    size_t                           n_done = 0;
};

static queue & get_queue(ggml_backend_t backend) {
    return *(queue *) backend->context;
}

// a point in a queue
struct event {
    queue * of    = nullptr;
    size_t  n_all = 0;
};

static size_t n_waits = 0;

// how often somebody waited since the last call, for what was not done
extern "C" size_t own_memory_n_waits(void) {
    return std::exchange(n_waits, 0);
}

// does the first so many of all tasks
static void finish(queue & q, size_t n_all) {
    if (q.n_done >= n_all) {
        return;
    }
    n_waits++;

    const opened memory;

    for (; q.n_done < n_all; ++q.n_done) {
        q.tasks.front()();
        q.tasks.pop_front();
    }
}

static void synchronize(ggml_backend_t backend) {
    queue & q = get_queue(backend);
    finish(q, q.n_done + q.tasks.size());
}

static void get_tensor_async(ggml_backend_t backend, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    get_queue(backend).tasks.push_back([=, from = (const char *) tensor->data + offset] {
        n_read += size;
        memcpy(data, from, size);
    });
}

static void set_tensor_async(ggml_backend_t backend, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    get_queue(backend).tasks.push_back([=, to = (char *) tensor->data + offset] { memcpy(to, data, size); });
}

static ggml_backend_event_t new_event(ggml_backend_dev_t dev) {
    return new ggml_backend_event{ dev, new event };
}

static void free_event(ggml_backend_dev_t, ggml_backend_event_t ev) {
    delete (event *) ev->context;
    delete ev;
}

static void record_event(ggml_backend_t backend, ggml_backend_event_t ev) {
    queue & q = get_queue(backend);
    *(event *) ev->context = { &q, q.n_done + q.tasks.size() };
}

static void wait_for_event(ggml_backend_dev_t, ggml_backend_event_t ev) {
    const auto & e = *(event *) ev->context;
    if (e.of) {
        finish(*e.of, e.n_all);
    }
}

static void compute_by_cpu(ggml_backend_t cpu, ggml_cgraph * graph) {
    GGML_ASSERT(ggml_backend_graph_compute(cpu, graph) == GGML_STATUS_SUCCESS);
}

static void compute(ggml_backend_t cpu, const task & t) {
    if (!emulates_cuda) {
        compute_by_cpu(cpu, t.graph);
        return;
    }

    for (int i = 0, end; i < t.graph->n_nodes; i = end) {
        ggml_tensor * node = t.graph->nodes[i];
        if (is_custom(node)) {
            llama_kv_mixed_op op;
            llama_kv_mixed_op_read(node, op);
            n_emulated[op.kind]++;

            emulate_node(node);
            end = i + 1;
            continue;
        }
        for (end = i + 1; end < t.graph->n_nodes && !is_custom(t.graph->nodes[end]); ++end) {}

        ggml_cgraph part = ggml_graph_view(t.graph, i, end);
        compute_by_cpu(cpu, &part);
    }
}

static ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if ((has_nodes() || emulates_cuda) && is_custom(node) && !get_node_reason(backend->device, node)) {
            continue;
        }
        if (is_custom(node) || !supports_op(backend->device, node)) {
            fprintf(stderr, "the device is given %s (%s), which it does not have\n", ggml_op_desc(node), node->name);
            return GGML_STATUS_FAILED;
        }
    }

    queue & q = get_queue(backend);
    q.tasks.push_back([cpu = q.cpu, t = std::make_shared<task>(graph)] { compute(cpu, *t); });

    return GGML_STATUS_SUCCESS;
}

static ggml_backend_t init_backend(ggml_backend_dev_t dev, const char *) {
    static uint8_t guid[16] = "own-memory-test";

    ggml_backend_i iface = {};
    iface.get_name         = [](ggml_backend_t) { return "OwnMemory"; };
    iface.free             = [](ggml_backend_t backend) {
        ggml_backend_free(get_queue(backend).cpu);
        delete &get_queue(backend);
        delete backend;
    };
    iface.graph_compute    = graph_compute;
    iface.set_tensor_async = set_tensor_async;
    iface.get_tensor_async = get_tensor_async;
    iface.synchronize      = synchronize;
    iface.event_record     = record_event;

    ggml_backend_t cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);

    auto * set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
            ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu)), "ggml_backend_set_n_threads");
    set_n_threads(cpu, 1);

    return new ggml_backend{ &guid, iface, dev, new queue{ cpu, {}, 0 } };
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
        iface.get_proc_address = get_proc_address;

        return ggml_backend_reg{ GGML_BACKEND_API_VERSION, iface, nullptr };
    }();

    return &res;
}

static ggml_backend_device * get_device() {
    static ggml_backend_device res = [] {
        ggml_backend_device_i iface = {};
        iface.get_name          = [](ggml_backend_dev_t) { return "OwnMemory0"; };
        iface.get_description   = [](ggml_backend_dev_t) { return "a device for tests"; };
        iface.get_memory        = get_memory;
        iface.get_type          = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
        iface.get_props         = get_props;
        iface.init_backend      = init_backend;
        iface.get_buffer_type   = get_buffer_type;
        iface.supports_op       = supports_op;
        iface.event_new         = new_event;
        iface.event_free        = free_event;
        iface.event_synchronize = wait_for_event;
        iface.supports_buft     = [](ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
            return buft == get_buffer_type(dev);
        };

        return ggml_backend_device{ iface, get_reg(), nullptr };
    }();

    return &res;
}

extern "C" ggml_backend_reg_t ggml_backend_init(void) {
    return get_reg();
}
