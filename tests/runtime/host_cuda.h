// The little of CUDA that runtime/step_kernels.cu uses, on a host: a block at a time, its threads as fibers that take turns
// where they wait for each other. What is exchanged is exchanged as on a GPU; what is timed, ordered in memory, or aligned is not.
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static  // one block runs at a time

struct Three {
    int x, y, z;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace host {
struct Barrier {
    int expected = 0, arrived = 0, generation = 0;
};
struct Fiber {
    Three thread;
    jmp_buf here;
    ucontext_t first;
    std::vector<char> stack;
    bool has_begun = false, has_ended = false, has_waited = false;
};
static std::vector<Fiber> fibers;
static std::vector<Barrier> warps;
static std::vector<float> exchanged;
static std::vector<unsigned> fragments;  // six of each thread
static Barrier block;
static Three block_index, grid;
static Fiber* current;
static jmp_buf scheduler;
static ucontext_t outside;
typedef uint64_t Word;
static void (*kernel)(Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word);
static Word arguments[11];

static void yield() {
    if (!_setjmp(current->here)) _longjmp(scheduler, 1);
}

static void meet(Barrier& barrier) {
    const int generation = barrier.generation;
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) yield();
}

static void body() {
    Word* a = arguments;
    kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10]);
    current->has_ended = true;
    _longjmp(scheduler, 1);
}

// Returns 0, 1 where threads wait for each other for ever, 2 where one did not wait for the kernel ahead.
static int run_block(int threads) {
    block = {threads, 0, 0};
    warps.assign(threads / 32, Barrier{32, 0, 0});
    exchanged.assign(threads, NAN);
    fragments.assign(6 * threads, 0);
    fibers.resize(threads);
    for (int t = 0; t < threads; ++t) {
        Fiber& one = fibers[t];
        one.stack.resize(1 << 16);
        one.has_begun = one.has_ended = one.has_waited = false;
        one.thread = {t, 0, 0};
    }
    for (long turns = 0, left = threads; left > 0; ++turns) {
        if (turns > 10'000'000) return 1;
        left = 0;
        for (Fiber& one : fibers) {
            if (one.has_ended) continue;
            current = &one;
            if (!_setjmp(scheduler)) {
                if (one.has_begun) _longjmp(one.here, 1);
                one.has_begun = true;
                getcontext(&one.first);
                one.first.uc_stack.ss_sp = one.stack.data();
                one.first.uc_stack.ss_size = one.stack.size();
                makecontext(&one.first, body, 0);
                setcontext(&one.first);
            }
            left += !current->has_ended;
        }
    }
    for (Fiber& one : fibers)
        if (!one.has_waited) return 2;
    return 0;
}
}  // namespace host

#define threadIdx (host::current->thread)
#define blockIdx (host::block_index)
#define gridDim (host::grid)

extern "C" int host_launch(void* kernel, const uint64_t* arguments, int count, int x, int y, int z, int threads) {
    std::memcpy(&host::kernel, &kernel, sizeof kernel);
    std::memset(host::arguments, 0, sizeof host::arguments);
    std::memcpy(host::arguments, arguments, count * sizeof(uint64_t));
    host::grid = {x, y, z};
    for (int k = z - 1; k >= 0; --k)  // no block may rely on another's having run
        for (int j = y - 1; j >= 0; --j)
            for (int i = x - 1; i >= 0; --i) {
                host::block_index = {i, j, k};
                if (int status = host::run_block(threads)) return status;
            }
    return 0;
}

static inline void __syncthreads() { host::meet(host::block); }
static inline void __threadfence() {}

static inline float __shfl_xor_sync(unsigned, float value, int distance) {
    const int thread = threadIdx.x;
    host::exchanged[thread] = value;
    host::meet(host::warps[thread / 32]);
    const float got = host::exchanged[thread ^ distance];
    host::meet(host::warps[thread / 32]);
    return got;
}

static inline int atomicAdd(int* at, int value) {
    const int before = *at;
    *at += value;
    return before;
}

template <typename Value>
static inline Value __ldcg(const Value* from) {
    return *from;
}

static inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

static inline float half_to_float(Stored bits) {
    _Float16 value;
    std::memcpy(&value, &bits, sizeof value);
    return float(value);
}

static inline Stored float_to_half(float value) {
    const _Float16 half = _Float16(value);
    Stored bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
}

static inline uint4 load_once(const Stored* from) {
    uint4 got;
    std::memcpy(&got, from, sizeof got);
    return got;
}

static inline void let_next_start() {}
static inline void wait_for_previous() { host::current->has_waited = true; }

#if IS_BF16
static inline float matrix_value(unsigned bits) { return __uint_as_float(bits << 16); }
#else
static inline float matrix_value(unsigned bits) { return half_to_float(Stored(bits)); }
#endif

// As the matrix units hold them (PTX, mma.m16n8k16): of a warp's registers, which lane has which value.
static inline void multiply(float (&sums)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    const int thread = threadIdx.x, lane = thread % 32;
    const unsigned own[6] = {a0, a1, a2, a3, b0, b1};
    for (int i = 0; i < 6; ++i) host::fragments[6 * thread + i] = own[i];
    host::meet(host::warps[thread / 32]);
    const auto value = [&](int holder, int which, int k) {
        return matrix_value((host::fragments[6 * (thread - lane + holder) + which] >> (16 * (k % 2))) & 0xffffu);
    };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        for (int k = 0; k < 16; ++k)
            sums[i] += value(4 * (row % 8) + k % 8 / 2, row / 8 + 2 * (k / 8), k) * value(4 * column + k % 8 / 2, 4 + k / 8, k);
    }
    host::meet(host::warps[thread / 32]);
}
