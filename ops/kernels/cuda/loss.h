// Losses over a vocabulary, and the work around a language-model head's product in training: a block takes a row, a
// thread four neighbouring numbers of it at a time. Sums are those of a thread's numbers in ascending order, then those
// of reduce.h, so that a loss is the same bits each time.
#pragma once

namespace gorgon {

constexpr int LOSS_THREADS = 512, LOSS_SHARED = LOSS_THREADS / 32 * sizeof(float);

// Numbers n .. n + 3 of a row of ``width``. Rows of a multiple of four are aligned for loads of 16 bytes if the first
// one is (wide); past the end the value is below every logit.
struct Four {
    float x[4];
};
__device__ inline Four load_four(const float* row, int width, int n, bool wide) {
    Four f;
    if (wide) {
        float4 v = *(const float4*)(row + n);
        f.x[0] = v.x, f.x[1] = v.y, f.x[2] = v.z, f.x[3] = v.w;
    } else
        for (int i = 0; i < 4; i++) f.x[i] = n + i < width ? row[n + i] : Largest::nothing;
    return f;
}
__device__ inline void store_four(float* row, int width, int n, bool wide, const Four& f) {
    if (wide) *(float4*)(row + n) = make_float4(f.x[0], f.x[1], f.x[2], f.x[3]);
    else
        for (int i = 0; i < 4 && n + i < width; i++) row[n + i] = f.x[i];
}
template <class... P> inline bool is_wide(int64_t width, const P*... arrays) {
    bool wide = width % 4 == 0;
    for (const void* p : {(const void*)arrays...}) wide = wide && (uintptr_t)p % 16 == 0;
    return wide;
}

// A block a row.
template <class... P, class... A> inline void over_rows(void (*kernel)(P...), int64_t rows, A... arguments) {
    if (rows) launch(kernel, dim3(rows), dim3(LOSS_THREADS), LOSS_SHARED, arguments...);
}

// sum = sum of exp(x - highest) over the numbers so far, whose largest is ``highest``: one pass over the row.
struct LogSum {
    float highest = Largest::nothing, sum = 0.0f;
    __device__ void add(const Four& f) {
        float largest = Largest::of(Largest::of(f.x[0], f.x[1]), Largest::of(f.x[2], f.x[3]));
        if (largest > highest) {
            sum *= exponential(highest - largest);
            highest = largest;
        }
        for (int i = 0; i < 4; i++) sum += exponential(f.x[i] - highest);
    }
    // Of all threads' numbers: the logarithm of the sum of their exponentials.
    __device__ float over_block(float* shared) const {
        float all = gorgon::over_block<Largest>(highest, shared);
        return all + logf(gorgon::over_block<Sum>(sum * exponential(highest - all), shared));
    }
};

// The result of a pass over a row: the logarithm of its sum, and how many logits rank before the target's.
struct RowRead {
    float log_sum, wanted;
    int rank;
};
__device__ inline RowRead read_row(const float* row, int width, bool wide, int target, float* shared) {
    RowRead read;
    read.wanted = row[target];
    LogSum all;
    int above = 0;
    for (int n = 4 * threadIdx.x; n < width; n += 4 * blockDim.x) {
        Four f = load_four(row, width, n, wide);
        all.add(f);
        for (int i = 0; i < 4; i++) above += f.x[i] > read.wanted || (f.x[i] == read.wanted && n + i < target);
    }
    read.log_sum = all.over_block(shared);
    read.rank = (int)over_block<Sum>((float)above, shared);  // exact: vocabularies are smaller than 2^24
    return read;
}

// ---- cross-entropy ----

// A negative target is ignored: loss 0, rank -1.
__global__ void __launch_bounds__(LOSS_THREADS)
    cross_entropy_kernel(const float* logits, const int32_t* targets, int width, bool wide, float* loss, float* log_sum,
                         int32_t* rank) {
    GORGON_SHARED(float, shared);
    int64_t r = blockIdx.x;
    RowRead read = {0.0f, 0.0f, -1};
    if (targets[r] >= 0) read = read_row(logits + r * width, width, wide, targets[r], shared);
    if (threadIdx.x) return;
    log_sum[r] = read.log_sum;
    loss[r] = read.log_sum - read.wanted;
    rank[r] = read.rank;
}

// grad = (softmax(logits) - onehot(target)) * weight, zero for ignored rows.
__global__ void __launch_bounds__(LOSS_THREADS)
    cross_entropy_backward_kernel(const float* logits, const int32_t* targets, const float* log_sum,
                                  const float* weight, int width, bool wide, float* grad) {
    int64_t r = blockIdx.x;
    int target = targets[r];
    for (int n = 4 * threadIdx.x; n < width; n += 4 * blockDim.x) {
        Four f = {};
        if (target >= 0) {
            f = load_four(logits + r * width, width, n, wide);
            for (int i = 0; i < 4; i++)
                f.x[i] = (exponential(f.x[i] - log_sum[r]) - (n + i == target ? 1.0f : 0.0f)) * weight[r];
        }
        store_four(grad + r * width, width, n, wide, f);
    }
}

inline void cross_entropy_forward(const float* logits, const int32_t* targets, int64_t rows, int64_t width, float* loss,
                                  float* log_sum, int32_t* rank) {
    over_rows(cross_entropy_kernel, rows, logits, targets, (int)width, is_wide(width, logits), loss, log_sum, rank);
}
inline void cross_entropy_backward(const float* logits, const int32_t* targets, const float* log_sum,
                                   const float* weight, int64_t rows, int64_t width, float* grad) {
    over_rows(cross_entropy_backward_kernel, rows, logits, targets, log_sum, weight, (int)width,
              is_wide(width, logits, grad), grad);
}

// ---- KL(softmax(teacher) || softmax(logits)) ----

// Twice over both rows: the divergence as one sum of differences would lose what the logits share.
__global__ void __launch_bounds__(LOSS_THREADS)
    kl_kernel(const float* logits, const float* teacher, int width, bool wide, float* loss, float* log_sum,
              float* teacher_log_sum) {
    GORGON_SHARED(float, shared);
    int64_t r = blockIdx.x;
    const float *x = logits + r * width, *t = teacher + r * width;
    LogSum student, frozen;
    for (int n = 4 * threadIdx.x; n < width; n += 4 * blockDim.x) {
        student.add(load_four(x, width, n, wide));
        frozen.add(load_four(t, width, n, wide));
    }
    float own = student.over_block(shared), given = frozen.over_block(shared), sum = 0.0f;
    for (int n = 4 * threadIdx.x; n < width; n += 4 * blockDim.x) {
        Four a = load_four(x, width, n, wide), b = load_four(t, width, n, wide);
        for (int i = 0; i < 4 && n + i < width; i++) {
            float log_p = b.x[i] - given;
            sum += exponential(log_p) * (log_p - a.x[i] + own);
        }
    }
    sum = over_block<Sum>(sum, shared);
    if (threadIdx.x) return;
    loss[r] = sum;
    log_sum[r] = own;
    teacher_log_sum[r] = given;
}

// grad = (softmax(logits) - softmax(teacher)) * weight.
__global__ void __launch_bounds__(LOSS_THREADS)
    kl_backward_kernel(const float* logits, const float* teacher, const float* log_sum, const float* teacher_log_sum,
                       const float* weight, int width, bool wide, float* grad) {
    int64_t r = blockIdx.x;
    for (int n = 4 * threadIdx.x; n < width; n += 4 * blockDim.x) {
        Four a = load_four(logits + r * width, width, n, wide), b = load_four(teacher + r * width, width, n, wide);
        for (int i = 0; i < 4; i++)
            a.x[i] = (exponential(a.x[i] - log_sum[r]) - exponential(b.x[i] - teacher_log_sum[r])) * weight[r];
        store_four(grad + r * width, width, n, wide, a);
    }
}

inline void kl_forward(const float* logits, const float* teacher, int64_t rows, int64_t width, float* loss,
                       float* log_sum, float* teacher_log_sum) {
    over_rows(kl_kernel, rows, logits, teacher, (int)width, is_wide(width, logits, teacher), loss, log_sum,
              teacher_log_sum);
}
inline void kl_backward(const float* logits, const float* teacher, const float* log_sum, const float* teacher_log_sum,
                        const float* weight, int64_t rows, int64_t width, float* grad) {
    over_rows(kl_backward_kernel, rows, logits, teacher, log_sum, teacher_log_sum, weight, (int)width,
              is_wide(width, logits, teacher, grad), grad);
}

// ---- linear cross-entropy: a chunk of rows' logits become losses, ranks and their own gradient ----

// row_weights (rows,): what each row's loss counts in the total. targets (rows,): negative where ignored. soft_ids,
// soft: (rows, num_soft), a distribution in addition to the target, of share soft_share; a negative id is padding.
// counted (rows,): each row's part of the total.
struct LinearLoss {
    int vocab, num_soft;
    const int32_t *targets, *soft_ids;
    const float *row_weights, *soft;
    float soft_share;
    float *counted, *losses;
    int32_t* ranks;
    // The rows after the first ``rows``.
    LinearLoss from(int64_t rows) const {
        LinearLoss l = *this;
        l.targets += rows, l.row_weights += rows, l.counted += rows, l.losses += rows, l.ranks += rows;
        if (num_soft) l.soft_ids += rows * num_soft, l.soft += rows * num_soft;
        return l;
    }
};

__device__ inline bool listed(const LinearLoss& l, int64_t i) {
    return l.soft_ids[i] >= 0 && l.soft_ids[i] < l.vocab && l.soft[i] > 0;
}

// With p the soft target, mass = sum p, held = hard + share mass, where hard + share = 1:
//     loss = hard (log Z - x_target) + share (sum p (log p - x) + mass log Z)
//     gradient of the logits = w (held softmax(x) - hard onehot(target) - share p)
__global__ void __launch_bounds__(LOSS_THREADS, 3)  // within 32 registers, for a fourth block, it would spill
    linear_loss_kernel(LinearLoss l, float* logits, bool wide, bool wants_grad) {
    GORGON_SHARED(float, shared);
    int64_t r = blockIdx.x, begin = r * l.num_soft;
    float* row = logits + r * l.vocab;
    int target = l.targets[r];
    float hard = 1.0f - l.soft_share, weight = l.row_weights[r], known = 0.0f, mass = 0.0f;
    if (target < 0) {
        if (threadIdx.x == 0) l.losses[r] = l.counted[r] = 0.0f, l.ranks[r] = -1;
        for (int n = 4 * threadIdx.x; wants_grad && n < l.vocab; n += 4 * blockDim.x)
            store_four(row, l.vocab, n, wide, Four{});
        return;
    }
    RowRead read = read_row(row, l.vocab, wide, target, shared);
    if (l.num_soft) {
        for (int64_t i = begin + threadIdx.x; i < begin + l.num_soft; i += blockDim.x)
            if (listed(l, i)) {
                mass += l.soft[i];
                known += l.soft[i] * (logf(l.soft[i]) - row[l.soft_ids[i]]);
            }
        mass = over_block<Sum>(mass, shared);
        known = over_block<Sum>(known, shared);
    }
    if (threadIdx.x == 0) {
        l.losses[r] = read.log_sum - read.wanted;
        l.counted[r] = weight * (hard * l.losses[r] + l.soft_share * (known + mass * read.log_sum));
        l.ranks[r] = read.rank;
    }
    if (!wants_grad) return;
    __syncthreads();  // all have read the row
    float held = weight * (hard + l.soft_share * mass);
    for (int n = 4 * threadIdx.x; n < l.vocab; n += 4 * blockDim.x) {
        Four f = load_four(row, l.vocab, n, wide);
        for (int i = 0; i < 4; i++)
            f.x[i] = held * exponential(f.x[i] - read.log_sum) - (n + i == target ? weight * hard : 0.0f);
        store_four(row, l.vocab, n, wide, f);
    }
    __syncthreads();
    // A token that is listed twice belongs to its first place, so that no two threads write one number.
    for (int64_t i = begin + threadIdx.x; i < begin + l.num_soft; i += blockDim.x) {
        if (!listed(l, i)) continue;
        float p = 0.0f;
        bool first = true;
        for (int64_t other = begin; other < begin + l.num_soft; other++)
            if (l.soft_ids[other] == l.soft_ids[i] && listed(l, other)) {
                first = first && other >= i;
                p += l.soft[other];
            }
        if (first) row[l.soft_ids[i]] -= weight * l.soft_share * p;
    }
}

inline void linear_loss(const LinearLoss& l, float* logits, int64_t rows, bool wants_grad) {
    over_rows(linear_loss_kernel, rows, l, logits, is_wide(l.vocab, logits), wants_grad);
}

// total = sum of x
inline void total(const float* x, int64_t count, float* sum) {
    launch(total_kernel<LOSS_THREADS>, dim3(1), dim3(LOSS_THREADS), LOSS_SHARED, x, count, sum);
}

// x += y
__global__ void __launch_bounds__(LOSS_THREADS) add_kernel(float* x, const float* y, int64_t count, bool wide) {
    int64_t i = 4 * ((int64_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (wide && i + 4 <= count) {
        float4 a = *(float4*)(x + i), b = *(const float4*)(y + i);
        *(float4*)(x + i) = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
    } else
        for (int64_t n = i; n < i + 4 && n < count; n++) x[n] += y[n];
}
inline void add(float* x, const float* y, int64_t count) {
    launch(add_kernel, dim3((count + 4 * LOSS_THREADS - 1) / (4 * LOSS_THREADS)), dim3(LOSS_THREADS), 0, x, y, count,
           is_wide(0, x, y));
}

// x *= scale[0], read on the device, so that the host does not wait; at 1, the usual scale, nothing is read or written.
__global__ void __launch_bounds__(LOSS_THREADS) scale_kernel(float* x, const float* scale, int64_t count, bool wide) {
    float factor = *scale;
    if (factor == 1.0f) return;
    int64_t i = 4 * ((int64_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (wide && i + 4 <= count) {
        float4 a = *(float4*)(x + i);
        *(float4*)(x + i) = make_float4(a.x * factor, a.y * factor, a.z * factor, a.w * factor);
    } else
        for (int64_t n = i; n < i + 4 && n < count; n++) x[n] *= factor;
}
inline void scale(float* x, const float* factor, int64_t count) {
    launch(scale_kernel, dim3((count + 4 * LOSS_THREADS - 1) / (4 * LOSS_THREADS)), dim3(LOSS_THREADS), 0, x, factor,
           count, is_wide(0, x));
}

}  // namespace gorgon
