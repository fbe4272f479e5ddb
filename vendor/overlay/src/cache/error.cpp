// what quantisation does to rows: measured on rows that have just been moved

#include "cache/kv-cache-mixed.h"

#include "formats/formats.h"

#include <cmath>

// the fast Walsh-Hadamard transform in blocks of n values, orthonormal and its own inverse
static void rotate(std::vector<float> & x, size_t n) {
    for (size_t h = 1; h < n; h *= 2) {
        for (size_t i = 0; i < x.size(); ++i) {
            if ((i & h) == 0) {
                const float a = x[i]    *0.70710678f;
                const float b = x[i + h]*0.70710678f;

                x[i]     = a + b;
                x[i + h] = a - b;
            }
        }
    }
}

void llama_kv_cache_mixed::measure_error(
                                  const migration & mig,
                             llama_kv_mixed_event & event,
          std::vector<llama_kv_mixed_layer_error> & layers) const {
    struct error {
        double   sum     = 0.0;
        double   sum_src = 0.0;
        float    max     = 0.0f;
        uint64_t n       = 0;

        void add(const error & other) {
            sum     += other.sum;
            sum_src += other.sum_src;
            max      = std::max(max, other.max);
            n       += other.n;
        }

        float rmse() const { return n == 0 ? 0.0f : (float) std::sqrt(sum    /n); }
        float rms () const { return n == 0 ? 0.0f : (float) std::sqrt(sum_src/n); }
    };

    std::vector<uint8_t> raw;

    const auto get_row = [&raw](const ggml_tensor * t, uint32_t row, std::vector<float> & out) {
        raw.resize(ggml_row_size(t->type, t->ne[0]));
        out.resize(t->ne[0]);

        ggml_backend_tensor_get(t, raw.data(), row*raw.size(), raw.size());

        llama_kv_mixed_expand_row(*llama_kv_mixed_find_format(t->type), raw.data(), out.size(), out.data());
    };

    std::vector<float> row_src;
    std::vector<float> row_dst;

    const auto compare = [&](const ggml_tensor * t_src, const ggml_tensor * t_dst, int64_t n_rot) {
        error res;

        for (size_t i = 0; i < mig.src.size(); ++i) {
            get_row(t_src, mig.src[i], row_src);
            get_row(t_dst, mig.dst[i], row_dst);
            rotate(row_dst, n_rot);

            for (size_t j = 0; j < row_src.size(); ++j) {
                const float d = std::fabs(row_src[j] - row_dst[j]);

                res.sum     += (double) d*d;
                res.sum_src += (double) row_src[j]*row_src[j];
                res.max      = std::max(res.max, d);
            }

            res.n += row_src.size();
        }

        return res;
    };

    error k_all;
    error v_all;

    for (size_t i = 0; i < kv_hot->layers.size(); ++i) {
        const auto & hot  = kv_hot ->layers[i];
        const auto & cold = kv_cold->layers[i];

        const error k = compare(hot.k_stream[mig.strm], cold.k_stream[mig.strm], n_rot_k);
        const error v = compare(hot.v_stream[mig.strm], cold.v_stream[mig.strm], n_rot_v);

        k_all.add(k);
        v_all.add(v);

        layers.push_back({ 0, (int32_t) hot.il, k.rmse(), k.max, v.rmse(), v.max, k.rms(), v.rms() });
    }

    event.rmse_k = k_all.rmse();
    event.max_k  = k_all.max;
    event.rmse_v = v_all.rmse();
    event.max_v  = v_all.max;
    event.rms_k  = k_all.rms();
    event.rms_v  = v_all.rms();
}
