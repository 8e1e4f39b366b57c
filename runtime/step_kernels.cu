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

// sums [16, 8] += a [16, 16] T * b [16, 8] T by the matrix unit: lane 4 g + q holds of a rows g, g + 8 and of b column g, their
// values 2 q, 2 q + 1, 2 q + 8, 2 q + 9; of the sums rows g, g + 8 and columns 2 q, 2 q + 1.
__device__ __forceinline__ void multiply(float (&sums)[4], Bits a0, Bits a1, Bits a2, Bits a3, Bits b0, Bits b1) {
#if IS_BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
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
constexpr int PITCH = WIDTH + VECTOR;   // of a normed row in shared memory: equal places of two rows lie in different banks
constexpr int TILE = 16, BLOCK = 32;    // weight rows of a tile, and values of each that four lanes load at a time
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

__device__ __forceinline__ uint4 vector_at(const Stored* values) { return *reinterpret_cast<const uint4*>(values); }

// Where the activations of a product come from: `at` gives eight values. `prefetch`, before the kernel ahead has ended, and
// `prepare`, after, are for every thread of a block.
template <int K>
struct Plain {  // [b, K] T
    const Stored* values;
    __device__ __forceinline__ void prefetch() {}
    __device__ __forceinline__ void prepare() {}
    __device__ __forceinline__ uint4 at(int b, int k) const { return vector_at(values + b * K + k); }
};

// A weight that every thread of a block needs, [m] T in shared memory; nobody's result, so it may be asked for at once.
__device__ __forceinline__ void keep_norm(const Stored* weight, Stored (&kept)[WIDTH]) {
    for (int i = threadIdx.x * VECTOR; i < WIDTH; i += THREADS * VECTOR)
        *reinterpret_cast<uint4*>(&kept[i]) = load_once(weight + i);
}

// x / rms(x) * weight of the residual stream [b, m] float32, normed once for the whole block: [b, m] T in shared memory, each row
// by warps of its own.
struct Normed {
    const float* x;
    const Stored* norm;
    Stored (&kept)[WIDTH];
    Stored (*normed)[PITCH];
    float* sums;
    __device__ __forceinline__ void prefetch() { keep_norm(norm, kept); }
    __device__ __forceinline__ uint4 at(int b, int k) const { return vector_at(&normed[b][k]); }
    __device__ __forceinline__ void prepare() {
        constexpr int FOUR = 4, STEP = 32 * WARPS_A_ROW * FOUR, COUNT = (WIDTH + STEP - 1) / STEP;
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp / WARPS_A_ROW;
        const int begin = ((warp % WARPS_A_ROW) * 32 + lane) * FOUR;
        float4 own[COUNT];
        float sum = 0;
        if (row < ROWS) {
            const float4* from = reinterpret_cast<const float4*>(x + row * WIDTH);
#pragma unroll
            for (int n = 0; n < COUNT; ++n)
                own[n] = begin + n * STEP < WIDTH ? from[(begin + n * STEP) / FOUR] : make_float4(0, 0, 0, 0);
#pragma unroll
            for (int n = 0; n < COUNT; ++n)
                sum += own[n].x * own[n].x + own[n].y * own[n].y + own[n].z * own[n].z + own[n].w * own[n].w;
        }
        sum = warp_sum(sum);
        if (lane == 0) sums[warp] = sum;
        __syncthreads();
        if (row < ROWS) {
            float total = 0;
#pragma unroll
            for (int i = 0; i < WARPS_A_ROW; ++i) total += sums[row * WARPS_A_ROW + i];
            const float scale = rsqrtf(total / WIDTH + NORM_EPS);
#pragma unroll
            for (int n = 0; n < COUNT; ++n) {
                const int i = begin + n * STEP;
                if (i < WIDTH) {
                    normed[row][i] = to_stored(own[n].x * scale * to_float(kept[i]));
                    normed[row][i + 1] = to_stored(own[n].y * scale * to_float(kept[i + 1]));
                    normed[row][i + 2] = to_stored(own[n].z * scale * to_float(kept[i + 2]));
                    normed[row][i + 3] = to_stored(own[n].w * scale * to_float(kept[i + 3]));
                }
            }
        }
        __syncthreads();
    }
};

// Dot products of R weight rows of K values with every row's activations. Of such a unit, `task` says which weight rows it
// takes, what else can be asked for beforehand (`prefetch`: weights; `fetch`: what a step computes), and what is done with the
// sums of row b.
#if ROWS == 1
// A warp a unit: every lane multiplies its own part of K.
template <int K, int R, typename Activations, typename Task>
__device__ __forceinline__ void product(int units, Activations activations, Task task) {
    constexpr int CHUNKS = (K + CHUNK - 1) / CHUNK;
    constexpr int AHEAD = CHUNKS < MAX_AHEAD / R ? CHUNKS : MAX_AHEAD / R;
    const int lane = threadIdx.x % 32, first = blockIdx.x * WARPS + threadIdx.x / 32, step = gridDim.x * WARPS;
    const Stored* rows[R];
    uint4 held[AHEAD][R];
    const auto load = [&](int chunk, uint4 (&into)[R]) {
        const int k = chunk * CHUNK + lane * VECTOR;
#pragma unroll
        for (int r = 0; r < R; ++r) into[r] = K % CHUNK == 0 || k < K ? load_once(rows[r] + k) : make_uint4(0, 0, 0, 0);
    };
    const auto begin = [&](int unit) {
#pragma unroll
        for (int r = 0; r < R; ++r) rows[r] = task.weights(unit, r);
#pragma unroll
        for (int chunk = 0; chunk < AHEAD; ++chunk) load(chunk, held[chunk]);
        if (lane == 0) task.prefetch(unit, 0);
    };
    if (first < units) begin(first);  // weights are nobody's result: they may be on their way while the kernel ahead ends
    activations.prefetch();
    let_next_start();
    wait_for_previous();
    if (first < units && lane == 0) task.fetch(first, 0);
    activations.prepare();
    for (int unit = first; unit < units; unit += step) {
        if (unit != first) {
            begin(unit);
            if (lane == 0) task.fetch(unit, 0);
        }
        float sums[R] = {};
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            float weights[R][VECTOR];
#pragma unroll
            for (int r = 0; r < R; ++r) unpack(held[chunk % AHEAD][r], weights[r]);
            if (chunk + AHEAD < CHUNKS) load(chunk + AHEAD, held[chunk % AHEAD]);
            const int k = chunk * CHUNK + lane * VECTOR;
            if (K % CHUNK == 0 || k < K) {
                float values[VECTOR];
                unpack(activations.at(0, k), values);
#pragma unroll
                for (int r = 0; r < R; ++r)
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) sums[r] = fmaf(weights[r][i], values[i], sums[r]);
            }
        }
#pragma unroll
        for (int r = 0; r < R; ++r) sums[r] = warp_sum(sums[r]);
        if (lane == 0) task.finish(unit, 0, sums);
    }
}
#else
// A block a tile of 16 weight rows, for up to 8 rows by the matrix units; its warps take parts of K, which are summed last. Which
// value of K stands where in a fragment is all the same as long as weights and activations agree: each lane takes eight that
// lie side by side, for two multiplications.
template <int K, int R, typename Activations, typename Task>
__device__ __forceinline__ void product(int units, Activations activations, Task task) {
    constexpr int OWN = (K + BLOCK * WARPS - 1) / (BLOCK * WARPS), AHEAD = OWN < MAX_AHEAD ? OWN : MAX_AHEAD, UNITS = TILE / R;
    __shared__ float parts[WARPS][TILE][8];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const int tiles = (units + UNITS - 1) / UNITS, first = blockIdx.x, step = gridDim.x;
    const int own = threadIdx.x / ROWS, b = threadIdx.x % ROWS;  // the unit of a tile and the row that this thread finishes
    const Stored* rows[2];
    uint4 held[AHEAD][2];
    const auto load = [&](int n, uint4 (&into)[2]) {
        const int k = (n * WARPS + warp) * BLOCK + q * VECTOR;
#pragma unroll
        for (int h = 0; h < 2; ++h) into[h] = k < K ? load_once(rows[h] + k) : make_uint4(0, 0, 0, 0);
    };
    const auto finishes = [&](int tile) { return own < UNITS && tile * UNITS + own < units; };
    const auto begin = [&](int tile) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int unit = tile * UNITS + (R == 2 ? g : g + 8 * h);
            rows[h] = task.weights(unit < units ? unit : units - 1, R == 2 ? h : 0);
        }
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) load(n, held[n]);
        if (finishes(tile)) task.prefetch(tile * UNITS + own, b);
    };
    if (first < tiles) begin(first);
    activations.prefetch();
    let_next_start();
    wait_for_previous();
    if (first < tiles && finishes(first)) task.fetch(first * UNITS + own, b);
    activations.prepare();
    for (int tile = first; tile < tiles; tile += step) {
        if (tile != first) {
            begin(tile);
            if (finishes(tile)) task.fetch(tile * UNITS + own, b);
        }
        float sums[4] = {};
#pragma unroll
        for (int n = 0; n < OWN; ++n) {
            const uint4 low = held[n % AHEAD][0], high = held[n % AHEAD][1];
            if (n + AHEAD < OWN) load(n + AHEAD, held[n % AHEAD]);
            const int k = (n * WARPS + warp) * BLOCK + q * VECTOR;
            const uint4 values = g < ROWS && k < K ? activations.at(g, k) : make_uint4(0, 0, 0, 0);
            multiply(sums, low.x, high.x, low.y, high.y, values.x, values.y);
            multiply(sums, low.z, high.z, low.w, high.w, values.z, values.w);
        }
        parts[warp][g][2 * q] = sums[0];
        parts[warp][g][2 * q + 1] = sums[1];
        parts[warp][g + 8][2 * q] = sums[2];
        parts[warp][g + 8][2 * q + 1] = sums[3];
        __syncthreads();
        if (finishes(tile)) {
            float totals[R] = {};
#pragma unroll
            for (int w = 0; w < WARPS; ++w)
#pragma unroll
                for (int r = 0; r < R; ++r) totals[r] += parts[w][own + 8 * r][b];
            task.finish(tile * UNITS + own, b, totals);
        }
        __syncthreads();
    }
}
#endif

// A product behind a norm of the residual stream x.
template <int R, typename Task>
__device__ __forceinline__ void product_of_norm(const float* x, const Stored* norm, int units, Task task) {
    __shared__ __align__(16) Stored kept[WIDTH];
    __shared__ __align__(16) Stored normed[ROWS][PITCH];
    __shared__ float sums[WARPS];
    product<WIDTH, R>(units, Normed{x, norm, kept, normed, sums}, task);
}

__device__ __forceinline__ float bias_at(const Stored* bias, int n) { return bias == nullptr ? 0.0f : to_float(bias[n]); }

// One row of a matrix [units, K] a unit, with a bias or none.
template <int K>
struct Rows {
    const Stored* matrix;
    const Stored* bias;
    float added = 0;
    __device__ __forceinline__ const Stored* weights(int unit, int) const { return matrix + (long long)unit * K; }
    __device__ __forceinline__ void prefetch(int unit, int) { added = bias_at(bias, unit); }
    __device__ __forceinline__ void fetch(int, int) {}
};

// x += matrix activations + bias.
template <int K>
struct AddTo : Rows<K> {
    float* x;
    float before = 0;
    __device__ __forceinline__ AddTo(const Stored* matrix, const Stored* bias, float* x) : Rows<K>{matrix, bias}, x(x) {}
    __device__ __forceinline__ void fetch(int unit, int b) { before = x[b * WIDTH + unit]; }
    __device__ __forceinline__ void finish(int unit, int b, const float (&sums)[1]) {
        x[b * WIDTH + unit] = before + sums[0] + this->added;
    }
};

// out [b, width] T = f(matrix activations + bias).
template <int K, bool IS_GELU>
struct StoreIn : Rows<K> {
    Stored* out;
    int width;
    __device__ __forceinline__ StoreIn(const Stored* matrix, const Stored* bias, Stored* out, int width)
        : Rows<K>{matrix, bias}, out(out), width(width) {}
    __device__ __forceinline__ void finish(int unit, int b, const float (&sums)[1]) {
        const float value = sums[0] + this->added;
        out[b * width + unit] = to_stored(IS_GELU ? gelu(value) : value);
    }
};

// ---- Kernels. Every one of them waits for the one ahead before it reads or writes what a step computes.

// ids [b] -> x [b, m].
extern "C" __global__ void __launch_bounds__(THREADS) embed(const long long* ids, const Stored* table, float* x) {
    let_next_start();
    wait_for_previous();
    const Stored* row = table + ids[blockIdx.x] * WIDTH;
    for (int i = threadIdx.x; i < WIDTH; i += THREADS) x[blockIdx.x * WIDTH + i] = to_float(row[i]);
}

// A pair of values of a head that are rotated together.
struct HeadPair {
    static constexpr int HALF = HEAD_SIZE / 2;
    const Stored *wq, *wk, *wv, *cosines, *sines;
    const long long* positions;
    float* queries;
    Stored *keys, *values;
    long long position = 0;
    float c = 1, s = 0;
    static __device__ __forceinline__ int place(int unit, int r) {
        return IS_INTERLEAVED ? 2 * (unit % HALF) + r : unit % HALF + r * HALF;
    }
    __device__ __forceinline__ const Stored* weights(int unit, int r) const {
        const int head = unit / HALF;
        const Stored* matrix = head < HEADS ? wq : head < HEADS + KV_HEADS ? wk : wv;
        const int own = head < HEADS ? head : (head - HEADS) % KV_HEADS;
        return matrix + (long long)(own * HEAD_SIZE + place(unit, r)) * WIDTH;
    }
    __device__ __forceinline__ void prefetch(int unit, int b) {  // a step's positions are its input, no kernel's result
        position = positions[b];
        const bool is_rotated = unit / HALF < HEADS + KV_HEADS;
        c = is_rotated ? to_float(cosines[position * HALF + unit % HALF]) : 1.0f;
        s = is_rotated ? to_float(sines[position * HALF + unit % HALF]) : 0.0f;
    }
    __device__ __forceinline__ void fetch(int, int) {}
    __device__ __forceinline__ void finish(int unit, int b, const float (&sums)[2]) {
        const int head = unit / HALF;
        const float first = sums[0] * c - sums[1] * s, second = sums[1] * c + sums[0] * s;
        if (head < HEADS) {
            float* own = queries + (b * HEADS + head) * HEAD_SIZE;
            own[place(unit, 0)] = first;
            own[place(unit, 1)] = second;
        } else {
            Stored* cache = head < HEADS + KV_HEADS ? keys : values;
            cache += ((long long)(b * KV_HEADS + (head - HEADS) % KV_HEADS) * CAPACITY + position) * HEAD_SIZE;
            cache[place(unit, 0)] = to_stored(first);
            cache[place(unit, 1)] = to_stored(second);
        }
    }
};

// Queries [b, heads, d] float32, rotated; keys and values into the caches [b, k, t, d] at each row's position.
extern "C" __global__ void __launch_bounds__(THREADS)
    project_heads(const float* x, const Stored* norm, const Stored* wq, const Stored* wk, const Stored* wv, const Stored* cosines,
                  const Stored* sines, const long long* positions, float* queries, Stored* keys, Stored* values) {
    product_of_norm<2>(
        x, norm, (HEADS + 2 * KV_HEADS) * HeadPair::HALF, HeadPair{wq, wk, wv, cosines, sines, positions, queries, keys, values});
}

// Softmax over the first positions[b] + 1 keys, a block for each (part of the keys, key/value head, row): attended [b, heads, d]
// T. Where the keys of a row are shared among several blocks, the last of them puts the parts together.
extern "C" __global__ void __launch_bounds__(THREADS)
    attend(const float* queries, const Stored* keys, const Stored* values, const long long* positions, float* partial,
           int* counters, Stored* attended) {
    __shared__ float merged[WARPS][GROUP][PARTIAL];
    __shared__ bool is_last;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % LANES, slot = warp * KEYS + lane / LANES;
    const int split = blockIdx.x, head = blockIdx.y, b = blockIdx.z;
    const int num_keys = int(positions[b]) + 1, even = (num_keys + SPLITS - 1) / SPLITS;
    const int share = even > MIN_KEYS ? even : MIN_KEYS, num_splits = (num_keys + share - 1) / share;
    const int begin = split * share, end = begin + share < num_keys ? begin + share : num_keys;
    const long long cache = (long long)(b * KV_HEADS + head) * CAPACITY * HEAD_SIZE + part * VECTOR;
    uint4 packed_key, packed_value;
    const auto load = [&](int key) {
        const long long place = cache + (long long)(key < end ? key : begin) * HEAD_SIZE;
        packed_key = __ldcg(reinterpret_cast<const uint4*>(keys + place));
        packed_value = __ldcg(reinterpret_cast<const uint4*>(values + place));
    };
    const int newest = num_keys - 1;  // the one key that this step has made
    if (split < num_splits && begin + slot != newest) load(begin + slot < newest ? begin + slot : begin);
    let_next_start();
    wait_for_previous();
    if (split >= num_splits) return;
    if (begin + slot == newest) load(newest);
    float query[GROUP][VECTOR], sum[GROUP][VECTOR] = {}, most[GROUP], weight[GROUP] = {};
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        most[g] = -INFINITY;
        const float4* from = reinterpret_cast<const float4*>(queries + (b * HEADS + head * GROUP + g) * HEAD_SIZE + part * VECTOR);
        const float4 low = from[0], high = from[1];
        query[g][0] = low.x * SOFTMAX_SCALE;
        query[g][1] = low.y * SOFTMAX_SCALE;
        query[g][2] = low.z * SOFTMAX_SCALE;
        query[g][3] = low.w * SOFTMAX_SCALE;
        query[g][4] = high.x * SOFTMAX_SCALE;
        query[g][5] = high.y * SOFTMAX_SCALE;
        query[g][6] = high.z * SOFTMAX_SCALE;
        query[g][7] = high.w * SOFTMAX_SCALE;
    }
    for (int base = begin; base < end; base += WARPS * KEYS) {
        const bool is_there = base + slot < end;
        float k[VECTOR], v[VECTOR];
        unpack(packed_key, k);
        unpack(packed_value, v);
        if (base + WARPS * KEYS < end) load(base + WARPS * KEYS + slot);
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
#pragma unroll
        for (int w = 0; w < WARPS; ++w) high = fmaxf(high, merged[w][g][HEAD_SIZE]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float kept = merged[w][g][HEAD_SIZE] == -INFINITY ? 0.0f : expf(merged[w][g][HEAD_SIZE] - high);
            total += merged[w][g][HEAD_SIZE + 1] * kept;
            own += merged[w][g][d] * kept;
        }
        if (num_splits == 1) {
            attended[(b * HEADS + head * GROUP + g) * HEAD_SIZE + d] = to_stored(own / total);
            continue;
        }
        float* into = parts + (split * GROUP + g) * PARTIAL;
        into[d] = own;
        if (d == 0) {
            into[HEAD_SIZE] = high;
            into[HEAD_SIZE + 1] = total;
        }
    }
    if (num_splits == 1) return;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // what the block wrote is there before it is counted, and what was counted is there before it is read
        is_last = atomicAdd(&counters[b * KV_HEADS + head], 1) == num_splits - 1;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    for (int i = threadIdx.x; i < GROUP * HEAD_SIZE; i += THREADS) {
        const int g = i / HEAD_SIZE, d = i % HEAD_SIZE;
        float highs[SPLITS], totals[SPLITS], sums[SPLITS], high = -INFINITY, total = 0, own = 0;
#pragma unroll
        for (int s = 0; s < SPLITS; ++s) {  // all of them on their way before the first is needed
            const float* from = parts + (s * GROUP + g) * PARTIAL;
            highs[s] = s < num_splits ? __ldcg(from + HEAD_SIZE) : -INFINITY;
            totals[s] = s < num_splits ? __ldcg(from + HEAD_SIZE + 1) : 0;
            sums[s] = s < num_splits ? __ldcg(from + d) : 0;
        }
#pragma unroll
        for (int s = 0; s < SPLITS; ++s) high = fmaxf(high, highs[s]);
#pragma unroll
        for (int s = 0; s < SPLITS; ++s) {
            const float kept = expf(highs[s] - high);
            total += totals[s] * kept;
            own += sums[s] * kept;
        }
        attended[(b * HEADS + head * GROUP + g) * HEAD_SIZE + d] = to_stored(own / total);
    }
    if (threadIdx.x == 0) counters[b * KV_HEADS + head] = 0;  // for the next layer
}

// x += attended wo.
extern "C" __global__ void __launch_bounds__(THREADS) project_out(const Stored* attended, const Stored* wo, float* x) {
    constexpr int K = HEADS * HEAD_SIZE;
    product<K, 1>(WIDTH, Plain<K>{attended}, AddTo<K>{wo, nullptr, x});
}

#if EXPERT_IS_SWIGLU
struct Gate {
    const Stored *w1, *w3, *bias1, *bias3;
    Stored* hidden;
    float added1 = 0, added3 = 0;
    __device__ __forceinline__ const Stored* weights(int unit, int r) const { return (r == 0 ? w1 : w3) + (long long)unit * WIDTH; }
    __device__ __forceinline__ void prefetch(int unit, int) {
        added1 = bias_at(bias1, unit);
        added3 = bias_at(bias3, unit);
    }
    __device__ __forceinline__ void fetch(int, int) {}
    __device__ __forceinline__ void finish(int unit, int b, const float (&sums)[2]) {
        hidden[b * HIDDEN + unit] = to_stored(silu(sums[0] + added1) * (sums[1] + added3));
    }
};

// hidden [b, HIDDEN] = silu(w1 norm(x)) * w3 norm(x).
extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_in(const float* x, const Stored* norm, const Stored* w1, const Stored* w3, const Stored* bias1, const Stored* bias3,
              Stored* hidden) {
    product_of_norm<2>(x, norm, HIDDEN, Gate{w1, w3, bias1, bias3, hidden});
}

// x += w2 hidden.
extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_out(const Stored* hidden, const Stored* w2, const Stored* bias2, float* x) {
    product<HIDDEN, 1>(WIDTH, Plain<HIDDEN>{hidden}, AddTo<HIDDEN>{w2, bias2, x});
}
#else
// inner [b, INNER] = down_proj norm(x).
extern "C" __global__ void __launch_bounds__(THREADS)
    adapter_down(const float* x, const Stored* norm, const Stored* down, Stored* inner) {
    product_of_norm<1>(x, norm, INNER, StoreIn<WIDTH, false>{down, nullptr, inner, INNER});
}

// hidden [b, HIDDEN] = gelu(fc1 inner).
extern "C" __global__ void __launch_bounds__(THREADS)
    adapter_in(const Stored* inner, const Stored* fc1, const Stored* bias1, Stored* hidden) {
    product<INNER, 1>(HIDDEN, Plain<INNER>{inner}, StoreIn<INNER, true>{fc1, bias1, hidden, HIDDEN});
}

// inner [b, INNER] = fc2 hidden.
extern "C" __global__ void __launch_bounds__(THREADS)
    adapter_out(const Stored* hidden, const Stored* fc2, const Stored* bias2, Stored* inner) {
    product<HIDDEN, 1>(INNER, Plain<HIDDEN>{hidden}, StoreIn<HIDDEN, false>{fc2, bias2, inner, INNER});
}

// x += up_proj inner.
extern "C" __global__ void __launch_bounds__(THREADS) adapter_up(const Stored* inner, const Stored* up, float* x) {
    product<INNER, 1>(WIDTH, Plain<INNER>{inner}, AddTo<INNER>{up, nullptr, x});
}
#endif

struct Logits : Rows<WIDTH> {
    float* logits;
    int num_ids;
    __device__ __forceinline__ Logits(const Stored* matrix, float* logits, int num_ids)
        : Rows<WIDTH>{matrix, nullptr}, logits(logits), num_ids(num_ids) {}
    __device__ __forceinline__ void finish(int unit, int b, const float (&sums)[1]) {
        logits[(long long)b * num_ids + unit] = sums[0];
    }
};

// logits [b, num_ids] float32 of one modality's ids.
extern "C" __global__ void __launch_bounds__(THREADS)
    head(const float* x, const Stored* norm, const Stored* weights, int num_ids, float* logits) {
    product_of_norm<1>(x, norm, num_ids, Logits{weights, logits, num_ids});
}
