#pragma once
// Log probabilities: what stands in each row of logits beside a chosen id, that id's rank, and the row's largest
// logits.
//
// Two kernels, as the sampler's and in its tiles. Scan reads every logit once, a block for each slice of a row, 32 of
// them in each thread's registers: 155 MB for 256 rows of 151,936, which an H200's memory delivers in 37 us. Of each of
// its warps it writes the sum of e^(logit - largest) and how many logits exceed the chosen id's, and of the slice its
// `count` largest logits. Merge, one block a row, joins these.
//
// The largest of a slice are found without sorting it. Of the largest logits of 32 groups of eight lanes, the count-th
// is a bound: so many logits reach it, and of random ones few more. Each warp takes those that do out of its registers,
// one at a time, for which it needs no other warp. What the warps found, some 6 logits for 5, is put in order by
// counting for each how many come before it.
//
// Ids are all different, so that order has no ties, and it does not matter which warp lists its logits first. Sums are
// of fixed parts in a fixed order: a row's result depends on that row alone. Logits that are NaN are never among the
// largest, but make the sum NaN, and with it every log probability.

#include "launch.cuh"
#include "sampler_row.cuh"

namespace nanoinfer::cuda {

struct Tell {
    const float* logits;    // [num_rows, at least vocab], rows logits_stride apart
    const int32_t* rows;    // [places] row of the logits; null: place i's is row i
    const int32_t* tokens;  // [places] the id that stands there; what is no id is told of as id 0
    int32_t* told;          // [places, 3 + 2 count]
    int64_t places, vocab, logits_stride, num_rows;
    int count;
    void* workspace;  // tell_workspace(places, vocab, count) bytes
};

constexpr int kMostTold = kWarp;  // largest count: the bound is that of a warp's worth of groups
constexpr int kGroup = kScanThreads / kWarp;

// A logit and its id, as a number that is the larger the earlier it comes: largest logit, then lowest id, first. 0:
// none.
using Entry = unsigned long long;

// 0 is added so that -0, which equals 0, does not come after it.
__device__ inline Entry entry_of(float logit, int id) { return Entry(key_of(logit + 0.0f)) << 32 | ~uint32_t(id); }
__device__ inline float logit_of(Entry entry) { return float_of(uint32_t(entry >> 32)); }
__device__ inline uint32_t id_of(Entry entry) { return ~uint32_t(entry); }

// What a scan's warp finds in its logits.
struct WarpSum {
    float base;  // the largest of them; finite where that is -infinity, so that subtracting it makes no NaN
    float sum;   // of e^(logit - base)
    int above;   // logits larger than the chosen id's
};

struct TellWork {
    Entry* largest;  // [slices, count] of a row, in order
    WarpSum* sums;   // [slices, kScanWarps]
};

inline int64_t tell_workspace(int64_t places, int64_t vocab, int count) {
    return places * slices_of(vocab) * int64_t(count * sizeof(Entry) + kScanWarps * sizeof(WarpSum));
}

// The parts that belong to slice `slice` of place i, and those after them.
__device__ inline TellWork tell_work(const Tell& p, int64_t i, int slice) {
    const int64_t slices = slices_of(p.vocab), at = i * slices + slice;
    Entry* entries = static_cast<Entry*>(p.workspace);
    WarpSum* sums = reinterpret_cast<WarpSum*>(entries + p.places * slices * p.count);
    return {entries + at * p.count, sums + at * kScanWarps};
}

// A row that is out of range counts as the first or last.
__device__ inline const float* told_row(const Tell& p, int64_t i) {
    const int64_t row = p.rows ? min(max(int64_t(p.rows[i]), int64_t(0)), p.num_rows - 1) : i;
    return p.logits + row * p.logits_stride;
}

__device__ inline int told_token(const Tell& p, int64_t i) {
    const int token = p.tokens[i];
    return token >= 0 && token < p.vocab ? token : 0;
}

__device__ inline float exp_of(float x) { return exp2_of(x * 1.44269504f); }  // log2(e)

// Of a thread's logits, NaNs left out; -infinity where there is nothing else.
__device__ inline float largest_of(const float (&x)[kScanTiles][kLane]) {
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kScanTiles; ++j) {
        largest = fmaxf(largest, fmaxf(fmaxf(x[j][0], x[j][1]), fmaxf(x[j][2], x[j][3])));
    }
    return largest;
}

// The same of all lanes' values, none of which is NaN; 0 for -0.
__device__ inline float warp_largest(float value) { return float_of(__reduce_max_sync(~0u, key_of(value + 0.0f))); }

// Sums up the warp's logits. `own`: the chosen id's.
__device__ inline WarpSum sum_warp(const float (&x)[kScanTiles][kLane], float largest, float own) {
    const float base = fmaxf(warp_largest(largest), -FLT_MAX);
    float sum = 0;
    int above = 0;
#pragma unroll
    for (int n = 0; n < kScanTiles * kLane; ++n) {
        const float logit = x[n / kLane][n % kLane];
        sum += exp_of(logit - base);
        above += logit > own;
    }
    return {base, warp_reduce(sum, Add()), __reduce_add_sync(~0u, above)};
}

// What a scan's block shares.
struct TellScan {
    float groups[kWarp];                 // largest logit of each group of lanes
    Entry list[kScanWarps * kMostTold];  // logits that may be among the largest, in any order
    int listed;
};

// A logit that at least `count` of the slice reach, since so many groups have one that does. `largest`: the thread's.
__device__ inline float find_bound(float largest, int count, TellScan& shared) {
    for (int apart = kGroup / 2; apart > 0; apart /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, apart));
    if (threadIdx.x % kGroup == 0) shared.groups[threadIdx.x / kGroup] = largest;
    if (threadIdx.x == 0) shared.listed = 0;
    __syncthreads();  // all groups' are there, and the list is empty
    const float own = shared.groups[threadIdx.x % kWarp];
    int above = 0;
#pragma unroll
    for (int group = 0; group < kWarp; ++group) above += shared.groups[group] > own;
    return float_of(__reduce_min_sync(~0u, above < count ? key_of(own) : ~0u));
}

// Takes the logit with this id of the slice out of the thread's, leaving NaN; the largest of those that are left.
template <int kVec>
__device__ inline float take_out(float (&x)[kScanTiles][kLane], int id) {
#pragma unroll
    for (int n = 0; n < kScanTiles * kLane; ++n) {
        if (id_in_slice<kVec>(n) == id) x[n / kLane][n % kLane] = NAN;
    }
    return largest_of(x);
}

// Lists those of the warp's logits that reach the bound, the first `count` of them at most: a warp alone may have all
// that the slice wants. Takes them out of x. `largest`: the thread's.
template <int kVec>
__device__ inline void list_largest(float (&x)[kScanTiles][kLane], float largest, float bound, int count, int slice,
                                    TellScan& shared) {
    for (int found = 0; found < count; ++found) {
        const float best = warp_largest(largest);
        if (best < bound) return;
        const int own = largest == best ? find_best<kVec>(x, best) : kSliceSize;
        const int id = __reduce_min_sync(~0u, own);
        if (id == kSliceSize) return;  // nothing but NaN is left
        if (own != id) continue;
        shared.list[atomicAdd(&shared.listed, 1)] = entry_of(best, slice * kSliceSize + id);
        largest = take_out<kVec>(x, id);
    }
}

// write(place, entry) for the first `count` entries of a list that the block shares. None comes after all others.
template <typename Write>
__device__ inline void put_in_order(const Entry* list, int size, int count, Write write) {
    for (int i = threadIdx.x; i < size; i += kScanThreads) {
        int before = 0;
        for (int j = 0; j < size; ++j) before += list[j] > list[i] || (list[j] == list[i] && j < i);
        if (before < count) write(before, list[i]);
    }
}

// kVec: logits in a load. Block b: slice b % slices of place b / slices. Four blocks an SM, as the sampler's.
template <int kVec>
__global__ void __launch_bounds__(kScanThreads, 4) tell_scan_kernel(const __grid_constant__ Tell p) {
    __shared__ TellScan shared;
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const int slices = slices_of(p.vocab), slice = blockIdx.x % slices;
    const int64_t i = blockIdx.x / slices;
    const float* logits = told_row(p, i);
    float x[kScanTiles][kLane];
    load_slice<kVec>(logits, p.vocab, slice, x);
    const float own = logits[told_token(p, i)];
    const TellWork work = tell_work(p, i, slice);
    const float largest = largest_of(x);
    const WarpSum sum = sum_warp(x, largest, own);
    if (threadIdx.x % kWarp == 0) work.sums[threadIdx.x / kWarp] = sum;
    if (p.count == 0) return;
    const float bound = find_bound(largest, p.count, shared);
    list_largest<kVec>(x, largest, bound, p.count, slice, shared);
    __syncthreads();  // every warp's are listed
    put_in_order(shared.list, shared.listed, p.count, [&](int place, Entry entry) { work.largest[place] = entry; });
    // Only where NaNs left fewer.
    for (int place = shared.listed + threadIdx.x; place < p.count; place += kScanThreads) work.largest[place] = 0;
}

// Place blockIdx.x.
__global__ void __launch_bounds__(kScanThreads) tell_merge_kernel(const __grid_constant__ Tell p) {
    __shared__ Entry list[kMaxSlices * kMostTold];
    __shared__ float scratch[kScanWarps];
    __shared__ int above_scratch[kScanWarps];
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const int64_t i = blockIdx.x;
    const int slices = slices_of(p.vocab), listed = slices * p.count, token = told_token(p, i);
    const float own = told_row(p, i)[token];
    const TellWork work = tell_work(p, i, 0);
    for (int n = threadIdx.x; n < listed; n += kScanThreads) list[n] = work.largest[n];
    float base = -FLT_MAX, sum = 0;
    int above = 0;
    for (int n = threadIdx.x; n < slices * kScanWarps; n += kScanThreads) base = fmaxf(base, work.sums[n].base);
    base = block_reduce(base, Largest(), -FLT_MAX, scratch);
    for (int n = threadIdx.x; n < slices * kScanWarps; n += kScanThreads) {
        sum += work.sums[n].sum * exp_of(work.sums[n].base - base);
        above += work.sums[n].above;
    }
    const float log_sum = logf(block_reduce(sum, Add(), 0.0f, scratch));
    above = block_reduce(above, Add(), 0, above_scratch);  // its barriers also let all see the list
    int32_t* told = p.told + i * (3 + 2 * p.count);
    const auto tell = [&](int place, int id, float logit) {
        told[1 + 2 * place] = id;
        told[2 + 2 * place] = __float_as_int(logit - base - log_sum);
    };
    if (threadIdx.x == 0) {
        told[0] = 1 + above;
        tell(0, token, own);
    }
    put_in_order(list, listed, p.count, [&](int place, Entry entry) {
        tell(1 + place, int(min(id_of(entry), uint32_t(p.vocab - 1))), logit_of(entry));
    });
}

template <int kVec>
cudaError_t launch_tell(const Tell& p, cudaStream_t stream) {
    const dim3 scan_grid(uint32_t(p.places * slices_of(p.vocab)));
    const cudaError_t error = launch_kernel(tell_scan_kernel<kVec>, scan_grid, kScanThreads, 0, stream, p);
    return error ? error : launch_kernel(tell_merge_kernel, dim3(p.places), kScanThreads, 0, stream, p);
}

// Takes up to kMaxVocab ids, of which at least `count`, at most kMostTold, are told of beside the chosen one.
inline cudaError_t tell(const Tell& p, cudaStream_t stream) {
    if (p.places == 0) return cudaSuccess;
    constexpr int kVec = kFullVec<float>;
    return fits_vectors<float>(p.logits, p.logits_stride) ? launch_tell<kVec>(p, stream) : launch_tell<1>(p, stream);
}

}  // namespace nanoinfer::cuda
