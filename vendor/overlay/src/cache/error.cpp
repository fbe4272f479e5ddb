// what quantisation does to rows: measured on rows that have just been moved

#include "cache/kv-cache-mixed.h"

#include "formats/formats.h"

#include <algorithm>
#include <cmath>

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

    // row of a tensor, in the basis of hot rows
    const auto get_row = [](const ggml_tensor * t, uint32_t row, const void * mean, int64_t n_rot) {
        std::vector<uint8_t> raw(ggml_row_size(t->type, t->ne[0]));
        std::vector<float>   res(t->ne[0]);

        ggml_backend_tensor_get(t, raw.data(), row*raw.size(), raw.size());

        llama_kv_mixed_restore_row(*llama_kv_mixed_find_format(t->type), raw.data(), mean, res.size(), n_rot, res.data());

        return res;
    };

    const auto get_mean = [&](size_t i_layer, uint32_t cell) {
        std::vector<uint8_t> res(means->get_size(i_layer));
        ggml_backend_tensor_get(means->get(i_layer), res.data(),
            means->get_offset(i_layer, mig.strm, llama_kv_mixed_means::page_of(cell)), res.size());
        return res;
    };

    // i_layer_mean: rows are stored less the means of this layer, -1: as they are
    const auto compare = [&](const ggml_tensor * t_src, const ggml_tensor * t_dst, int64_t n_rot, int i_layer_mean) {
        error res;

        for (size_t i = 0; i < mig.src.size(); ++i) {
            const auto mean = i_layer_mean >= 0 ? get_mean(i_layer_mean, mig.dst[i]) : std::vector<uint8_t>();

            const auto row_src = get_row(t_src, mig.src[i], nullptr, 0);
            const auto row_dst = get_row(t_dst, mig.dst[i], i_layer_mean >= 0 ? mean.data() : nullptr, n_rot);

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

        const error k = compare(hot.k_stream[mig.strm], cold.k_stream[mig.strm], n_rot_k, means ? (int) i : -1);
        const error v = compare(hot.v_stream[mig.strm], cold.v_stream[mig.strm], n_rot_v, -1);

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
