// A decode step of rows of one modality in few kernels: five a layer for a SwiGLU expert, seven for an adapter.
//
// A step reads every weight of its modality once and computes next to nothing with it: what it costs is reading, and beginning
// and ending kernels. So what belongs to one product is done in its kernel (norm before, rotation, cache write, activation,
// residual sum behind), and a kernel asks for its first weights before it waits for the one ahead of it, which needs no launch
// order beyond that wait (programmatic dependent launch, compute capability 9.0 on; older GPUs run the kernels one by one).
//
// Compiled at run time for one model, modality and number of rows: every size is a macro (runtime/step_kernels.py). The
// residual stream is float32; products take values rounded to the weights' type T and sum in float32.
// Shape letters: b row, k key/value head, t cache capacity, d head size, m model width.

typedef unsigned short Stored;  // the bits of a T
typedef unsigned int Bits;

// ---- The device. A host that examines these kernels without a GPU has its own (tests/runtime/host_cuda.h).

#ifdef HOST_CUDA
#include HOST_CUDA
#else
#define INFINITY __int_as_float(0x7f800000)

// Read once and by one warp: not worth a place in the first cache.
__device__ __forceinline__ uint4 load_once(const Stored* from) {
    uint4 got;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(got.x), "=r"(got.y), "=r"(got.z), "=r"(got.w)
                 : "l"(from));
    return got;
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ float half_to_float(Stored bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ Stored float_to_half(float value) {
    Stored bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

constexpr int WARPS = THREADS / 32;
constexpr int VECTOR = 8;               // T values of one 16-byte load
constexpr int CHUNK = 32 * VECTOR;      // what a warp loads of one row at a time
constexpr int WARPS_A_ROW = WARPS / ROWS;
constexpr int GROUP = HEADS / KV_HEADS;
constexpr int LANES = HEAD_SIZE / VECTOR;  // lanes that share one key
constexpr int KEYS = 32 / LANES;           // keys of a warp at a time
constexpr int PARTIAL = HEAD_SIZE + 2;     // sum of values, then maximum and sum of weights

// ---- Numbers.

#if IS_BF16
__device__ __forceinline__ float to_float(Stored bits) { return __uint_as_float(Bits(bits) << 16); }

__device__ __forceinline__ Stored to_stored(float value) {  // to nearest, ties to even
    const Bits bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return Stored(bits >> 16) | 0x40;
    return Stored((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

__device__ __forceinline__ void unpack(Bits pair, float& low, float& high) {
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xffff0000u);
}
#else
__device__ __forceinline__ float to_float(Stored bits) { return half_to_float(bits); }
__device__ __forceinline__ Stored to_stored(float value) { return float_to_half(value); }

__device__ __forceinline__ void unpack(Bits pair, float& low, float& high) {
    low = to_float(Stored(pair & 0xffffu));
    high = to_float(Stored(pair >> 16));
}
#endif

__device__ __forceinline__ void unpack(const uint4& packed, float (&values)[VECTOR]) {
    unpack(packed.x, values[0], values[1]);
    unpack(packed.y, values[2], values[3]);
    unpack(packed.z, values[4], values[5]);
    unpack(packed.w, values[6], values[7]);
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

__device__ __forceinline__ float warp_sum(float value) {  // every lane gets it
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// ---- Products.

// x [b, m] float32 -> normed [b, m] T in shared memory: x / rms(x) * weight, each row by warps of its own.
__device__ __forceinline__ void normalize(const float* x, const Stored* weight, Stored (*normed)[WIDTH], float* sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp / WARPS_A_ROW;
    const int begin = (warp % WARPS_A_ROW) * 32 + lane;
    float sum = 0;
    if (row < ROWS)
        for (int i = begin; i < WIDTH; i += 32 * WARPS_A_ROW) sum += x[row * WIDTH + i] * x[row * WIDTH + i];
    sum = warp_sum(sum);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    if (row < ROWS) {
        float total = 0;
        for (int i = 0; i < WARPS_A_ROW; ++i) total += sums[row * WARPS_A_ROW + i];
        const float scale = rsqrtf(total / WIDTH + NORM_EPS);
        for (int i = begin; i < WIDTH; i += 32 * WARPS_A_ROW)
            normed[row][i] = to_stored(x[row * WIDTH + i] * scale * to_float(weight[i]));
    }
    __syncthreads();
}

// Dot products of R weight rows of K values with every row's activations, a warp a unit; `write(unit, row, sums)` for one lane.
template <int K, int R, typename RowOf, typename Prepare, typename Activations, typename Write>
__device__ __forceinline__ void product(int units, RowOf row_of, Prepare prepare, Activations activations, Write write) {
    constexpr int CHUNKS = (K + CHUNK - 1) / CHUNK;
    constexpr int AHEAD = CHUNKS < MAX_AHEAD / R ? CHUNKS : MAX_AHEAD / R;
    const int lane = threadIdx.x % 32, first = blockIdx.x * WARPS + threadIdx.x / 32, step = gridDim.x * WARPS;
    const Stored* rows[R];
    uint4 held[AHEAD][R];
    const auto fetch = [&](int chunk, uint4 (&into)[R]) {
        const int k = chunk * CHUNK + lane * VECTOR;
#pragma unroll
        for (int r = 0; r < R; ++r) into[r] = K % CHUNK == 0 || k < K ? load_once(rows[r] + k) : make_uint4(0, 0, 0, 0);
    };
    const auto begin = [&](int unit) {
#pragma unroll
        for (int r = 0; r < R; ++r) rows[r] = row_of(unit, r);
#pragma unroll
        for (int chunk = 0; chunk < AHEAD; ++chunk) fetch(chunk, held[chunk]);
    };
    if (first < units) begin(first);  // weights are nobody's result: they may be on their way while the kernel ahead ends
    let_next_start();
    wait_for_previous();
    prepare();
    for (int unit = first; unit < units; unit += step) {
        if (unit != first) begin(unit);
        float sums[R][ROWS] = {};
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            float weights[R][VECTOR];
#pragma unroll
            for (int r = 0; r < R; ++r) unpack(held[chunk % AHEAD][r], weights[r]);
            if (chunk + AHEAD < CHUNKS) fetch(chunk + AHEAD, held[chunk % AHEAD]);
            const int k = chunk * CHUNK + lane * VECTOR;
            if (K % CHUNK == 0 || k < K) {
#pragma unroll
                for (int b = 0; b < ROWS; ++b) {
                    float values[VECTOR];
                    unpack(activations(b, k), values);
#pragma unroll
                    for (int r = 0; r < R; ++r)
#pragma unroll
                        for (int i = 0; i < VECTOR; ++i) sums[r][b] = fmaf(weights[r][i], values[i], sums[r][b]);
                }
            }
        }
#pragma unroll
        for (int b = 0; b < ROWS; ++b) {
            float own[R];
#pragma unroll
            for (int r = 0; r < R; ++r) own[r] = warp_sum(sums[r][b]);
            if (lane == b) write(unit, b, own);
        }
    }
}

__device__ __forceinline__ uint4 vector_at(const Stored* values) { return *reinterpret_cast<const uint4*>(values); }

// A product behind a norm of the residual stream x.
template <int R, typename RowOf, typename Write>
__device__ __forceinline__ void product_of_norm(const float* x, const Stored* norm, int units, RowOf row_of, Write write) {
    __shared__ __align__(16) Stored normed[ROWS][WIDTH];
    __shared__ float sums[WARPS];
    product<WIDTH, R>(
        units, row_of, [&] { normalize(x, norm, normed, sums); }, [&](int b, int k) { return vector_at(&normed[b][k]); }, write);
}

// A product of activations [b, K] T.
template <int K, int R, typename RowOf, typename Write>
__device__ __forceinline__ void product_of(const Stored* activations, int units, RowOf row_of, Write write) {
    product<K, R>(
        units, row_of, [] {}, [&](int b, int k) { return vector_at(activations + b * K + k); }, write);
}

__device__ __forceinline__ float biased(float value, const Stored* bias, int n) {
    return bias == nullptr ? value : value + to_float(bias[n]);
}

// ---- Kernels. Every one of them waits for the one ahead before it reads or writes what a step computes.

// ids [b] -> x [b, m].
extern "C" __global__ void __launch_bounds__(THREADS) embed(const long long* ids, const Stored* table, float* x) {
    let_next_start();
    wait_for_previous();
    const Stored* row = table + ids[blockIdx.x] * WIDTH;
    for (int i = threadIdx.x; i < WIDTH; i += THREADS) x[blockIdx.x * WIDTH + i] = to_float(row[i]);
}

// Queries [b, heads, d] float32, rotated; keys and values into the caches [b, k, t, d] at each row's position. A unit is a pair
// of values that are rotated together.
extern "C" __global__ void __launch_bounds__(THREADS)
    project_heads(const float* x, const Stored* norm, const Stored* wq, const Stored* wk, const Stored* wv, const Stored* cosines,
                  const Stored* sines, const long long* positions, float* queries, Stored* keys, Stored* values) {
    constexpr int HALF = HEAD_SIZE / 2;
    const auto place = [](int unit, int r) { return IS_INTERLEAVED ? 2 * (unit % HALF) + r : unit % HALF + r * HALF; };
    product_of_norm<2>(
        x, norm, (HEADS + 2 * KV_HEADS) * HALF,
        [&](int unit, int r) {
            const int head = unit / HALF;
            const Stored* matrix = head < HEADS ? wq : head < HEADS + KV_HEADS ? wk : wv;
            const int own = head < HEADS ? head : (head - HEADS) % KV_HEADS;
            return matrix + (long long)(own * HEAD_SIZE + place(unit, r)) * WIDTH;
        },
        [&](int unit, int b, const float (&sums)[2]) {
            const int head = unit / HALF;
            const long long position = positions[b];
            float first = sums[0], second = sums[1];
            if (head < HEADS + KV_HEADS) {
                const float c = to_float(cosines[position * HALF + unit % HALF]), s = to_float(sines[position * HALF + unit % HALF]);
                first = sums[0] * c - sums[1] * s;
                second = sums[1] * c + sums[0] * s;
            }
            if (head < HEADS) {
                float* own = queries + (b * HEADS + head) * HEAD_SIZE;
                own[place(unit, 0)] = first;
                own[place(unit, 1)] = second;
            } else {
                const int own = (head - HEADS) % KV_HEADS;
                Stored* cache = head < HEADS + KV_HEADS ? keys : values;
                cache += ((long long)(b * KV_HEADS + own) * CAPACITY + position) * HEAD_SIZE;
                cache[place(unit, 0)] = to_stored(first);
                cache[place(unit, 1)] = to_stored(second);
            }
        });
}

// Softmax over the first positions[b] + 1 keys, a block for each (part of the keys, key/value head, row); the last block of a
// head puts the parts together: attended [b, heads, d] T.
extern "C" __global__ void __launch_bounds__(THREADS)
    attend(const float* queries, const Stored* keys, const Stored* values, const long long* positions, float* partial,
           int* counters, Stored* attended) {
    __shared__ float merged[WARPS][GROUP][PARTIAL];
    __shared__ bool is_last;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % LANES, slot = warp * KEYS + lane / LANES;
    const int split = blockIdx.x, head = blockIdx.y, b = blockIdx.z;
    let_next_start();
    wait_for_previous();
    const int num_keys = int(positions[b]) + 1, share = (num_keys + SPLITS - 1) / SPLITS;
    const int begin = split * share, end = begin + share < num_keys ? begin + share : num_keys;
    const long long cache = (long long)(b * KV_HEADS + head) * CAPACITY * HEAD_SIZE + part * VECTOR;
    float query[GROUP][VECTOR], sum[GROUP][VECTOR] = {}, most[GROUP], weight[GROUP] = {};
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        most[g] = -INFINITY;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i)
            query[g][i] = queries[(b * HEADS + head * GROUP + g) * HEAD_SIZE + part * VECTOR + i] * SOFTMAX_SCALE;
    }
    for (int base = begin; base < end; base += WARPS * KEYS) {
        const int key = base + slot;
        const bool is_there = key < end;
        const long long place = cache + (long long)(is_there ? key : begin) * HEAD_SIZE;
        float k[VECTOR], v[VECTOR];
        unpack(vector_at(keys + place), k);
        unpack(vector_at(values + place), v);
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            float score = 0;
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) score = fmaf(query[g][i], k[i], score);
            for (int distance = LANES / 2; distance > 0; distance /= 2) score += __shfl_xor_sync(0xffffffffu, score, distance);
            if (is_there) {
                const float high = fmaxf(most[g], score), kept = expf(most[g] - high), own = expf(score - high);
                most[g] = high;
                weight[g] = weight[g] * kept + own;
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) sum[g][i] = sum[g][i] * kept + own * v[i];
            }
        }
    }
    // Every key slot of the warp has seen keys of its own.
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        float high = most[g];
        for (int distance = LANES; distance < 32; distance *= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, distance));
        const float kept = most[g] == -INFINITY ? 0.0f : expf(most[g] - high);
        weight[g] *= kept;
        for (int distance = LANES; distance < 32; distance *= 2) weight[g] += __shfl_xor_sync(0xffffffffu, weight[g], distance);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            float own = sum[g][i] * kept;
            for (int distance = LANES; distance < 32; distance *= 2) own += __shfl_xor_sync(0xffffffffu, own, distance);
            if (lane < LANES) merged[warp][g][part * VECTOR + i] = own;
        }
        if (lane == 0) {
            merged[warp][g][HEAD_SIZE] = high;
            merged[warp][g][HEAD_SIZE + 1] = weight[g];
        }
    }
    __syncthreads();
    float* parts = partial + (long long)(b * KV_HEADS + head) * SPLITS * GROUP * PARTIAL;
    for (int i = threadIdx.x; i < GROUP * HEAD_SIZE; i += THREADS) {
        const int g = i / HEAD_SIZE, d = i % HEAD_SIZE;
        float high = -INFINITY, total = 0, own = 0;
        for (int w = 0; w < WARPS; ++w) high = fmaxf(high, merged[w][g][HEAD_SIZE]);
        for (int w = 0; w < WARPS; ++w) {
            const float kept = merged[w][g][HEAD_SIZE] == -INFINITY ? 0.0f : expf(merged[w][g][HEAD_SIZE] - high);
            total += merged[w][g][HEAD_SIZE + 1] * kept;
            own += merged[w][g][d] * kept;
        }
        float* into = parts + (split * GROUP + g) * PARTIAL;
        into[d] = own;
        if (d == 0) {
            into[HEAD_SIZE] = high;
            into[HEAD_SIZE + 1] = total;
        }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(&counters[b * KV_HEADS + head], 1) == SPLITS - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    for (int i = threadIdx.x; i < GROUP * HEAD_SIZE; i += THREADS) {
        const int g = i / HEAD_SIZE, d = i % HEAD_SIZE;
        float high = -INFINITY, total = 0, own = 0;
        for (int s = 0; s < SPLITS; ++s) high = fmaxf(high, __ldcg(parts + (s * GROUP + g) * PARTIAL + HEAD_SIZE));
        for (int s = 0; s < SPLITS; ++s) {
            const float* from = parts + (s * GROUP + g) * PARTIAL;
            const float top = __ldcg(from + HEAD_SIZE), kept = top == -INFINITY ? 0.0f : expf(top - high);
            total += __ldcg(from + HEAD_SIZE + 1) * kept;
            own += __ldcg(from + d) * kept;
        }
        attended[(b * HEADS + head * GROUP + g) * HEAD_SIZE + d] = to_stored(own / total);
    }
    if (threadIdx.x == 0) counters[b * KV_HEADS + head] = 0;  // for the next layer
}

// x += attended wo.
extern "C" __global__ void __launch_bounds__(THREADS) project_out(const Stored* attended, const Stored* wo, float* x) {
    constexpr int K = HEADS * HEAD_SIZE;
    product_of<K, 1>(
        attended, WIDTH, [&](int unit, int) { return wo + (long long)unit * K; },
        [&](int unit, int b, const float (&sums)[1]) { x[b * WIDTH + unit] += sums[0]; });
}

#if EXPERT_IS_SWIGLU
// hidden [b, HIDDEN] = silu(w1 norm(x)) * w3 norm(x).
extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_in(const float* x, const Stored* norm, const Stored* w1, const Stored* w3, const Stored* bias1, const Stored* bias3,
              Stored* hidden) {
    product_of_norm<2>(
        x, norm, HIDDEN, [&](int unit, int r) { return (r == 0 ? w1 : w3) + (long long)unit * WIDTH; },
        [&](int unit, int b, const float (&sums)[2]) {
            hidden[b * HIDDEN + unit] = to_stored(silu(biased(sums[0], bias1, unit)) * biased(sums[1], bias3, unit));
        });
}

// x += w2 hidden.
extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_out(const Stored* hidden, const Stored* w2, const Stored* bias2, float* x) {
    product_of<HIDDEN, 1>(
        hidden, WIDTH, [&](int unit, int) { return w2 + (long long)unit * HIDDEN; },
        [&](int unit, int b, const float (&sums)[1]) { x[b * WIDTH + unit] += biased(sums[0], bias2, unit); });
}
#else
// inner [b, INNER] = down_proj norm(x).
extern "C" __global__ void __launch_bounds__(THREADS)
    adapter_down(const float* x, const Stored* norm, const Stored* down, Stored* inner) {
    product_of_norm<1>(
        x, norm, INNER, [&](int unit, int) { return down + (long long)unit * WIDTH; },
        [&](int unit, int b, const float (&sums)[1]) { inner[b * INNER + unit] = to_stored(sums[0]); });
}

// hidden [b, HIDDEN] = gelu(fc1 inner).
extern "C" __global__ void __launch_bounds__(THREADS)
    adapter_in(const Stored* inner, const Stored* fc1, const Stored* bias1, Stored* hidden) {
    product_of<INNER, 1>(
        inner, HIDDEN, [&](int unit, int) { return fc1 + (long long)unit * INNER; },
        [&](int unit, int b, const float (&sums)[1]) { hidden[b * HIDDEN + unit] = to_stored(gelu(biased(sums[0], bias1, unit))); });
}

// inner [b, INNER] = fc2 hidden.
extern "C" __global__ void __launch_bounds__(THREADS)
    adapter_out(const Stored* hidden, const Stored* fc2, const Stored* bias2, Stored* inner) {
    product_of<HIDDEN, 1>(
        hidden, INNER, [&](int unit, int) { return fc2 + (long long)unit * HIDDEN; },
        [&](int unit, int b, const float (&sums)[1]) { inner[b * INNER + unit] = to_stored(biased(sums[0], bias2, unit)); });
}

// x += up_proj inner.
extern "C" __global__ void __launch_bounds__(THREADS) adapter_up(const Stored* inner, const Stored* up, float* x) {
    product_of<INNER, 1>(
        inner, WIDTH, [&](int unit, int) { return up + (long long)unit * INNER; },
        [&](int unit, int b, const float (&sums)[1]) { x[b * WIDTH + unit] += sums[0]; });
}
#endif

// logits [b, num_ids] float32 of one modality's ids.
extern "C" __global__ void __launch_bounds__(THREADS)
    head(const float* x, const Stored* norm, const Stored* weights, int num_ids, float* logits) {
    product_of_norm<1>(
        x, norm, num_ids, [&](int unit, int) { return weights + (long long)unit * WIDTH; },
        [&](int unit, int b, const float (&sums)[1]) { logits[(long long)b * num_ids + unit] = sums[0]; });
}
