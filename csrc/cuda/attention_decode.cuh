#pragma once
// Attention of short chunks (decoded tokens, drafts): limited by reading K and V, which happens once for all query
// heads of a KV head.
//
// A row is one query head of one token. An item of work is (chunk, split of its keys, 8 or 16 of its rows); a block
// keeps to one KV head, lists its items, up to 32 at once, and takes them in turn. Its warps share an item's rows and
// take its keys in turns of 16: K and V of 16 keys are a stage in a ring that the warp alone fills and reads, so
// nothing in the loop over keys waits for another warp. The ring is filled ahead across items: while a block ends one
// item, the next one's keys are on their way. Keys stand in the long side of the matrix instructions, rows in the short
// one, of 8: groups of up to 8 heads (6 and 7 in Qwen2) leave little of it unused.

#include "attention_decode_rows.cuh"
#include "attention_merge.cuh"
#include "launch.cuh"

namespace nanoinfer::cuda {

template <int kStages>
__device__ int next_stage(int stage) {
    return stage + 1 == kStages ? 0 : stage + 1;
}

// What one warp copies: the keys of all listed items, in the order in which it will use them.
template <typename Shape>
class KeyFeed {
    static constexpr int D = Shape::kDim;

  public:
    __device__ KeyFeed(const PagedAttention& p, const DecodeItem* items, uint32_t ring)
        : p_(p), items_(items), ring_(ring) {}

    // Begins with the first of `count` items.
    __device__ void start(int count) {
        left_ = count;
        next_ = items_;
        enter();
    }

    // Starts to copy the next 16 keys and values to the next stage. Makes one group of copies even when there are no
    // more keys, so that counting groups counts stages.
    __device__ void push() {
        if (key_ < end_) {
            const int entry = __shfl_sync(kAllLanes, entries_, turn_);
            const char* keys = keys_address<D>(p_, entry, blockIdx.x, key_);
            const uint32_t stage = ring_ + stage_ * Shape::kStageBytes;
            copy_keys<D>(stage, keys);
            copy_keys<D>(stage + Shape::kStageBytes / 2, keys + value_offset<D>(p_));
            key_ += kStride;
            turn_ = (turn_ + 1) & 31;
            if (key_ >= end_) {
                enter();
            } else if (turn_ == 0) {
                look_up();
            }
        }
        stage_ = next_stage<Shape::kStages>(stage_);
        commit_copies();
    }

  private:
    static constexpr int kStride = Shape::kWarps * Shape::kKeys;

    // Goes to the next item that has keys for this warp; where there is none, no key is left.
    __device__ void enter() {
        for (key_ = end_ = 0; key_ >= end_ && left_ > 0; --left_, ++next_) {
            key_ = next_->begin + threadIdx.x / 32 * Shape::kKeys;
            end_ = next_->end;
            row_ = next_->chunk.row;
        }
        turn_ = 0;
        if (key_ < end_) look_up();
    }

    // Lane i takes the table's entry for the warp's i-th turn from now, or the last one; nothing waits for it before
    // its use.
    __device__ void look_up() {
        const int position = smaller(key_ + int(threadIdx.x % 32) * kStride, end_ - 1);
        load_now(entries_, table_entry(p_, row_, position), true);
    }

    const PagedAttention& p_;
    const DecodeItem* const items_;
    const uint32_t ring_;
    const DecodeItem* next_;
    int left_, stage_ = 0, key_, end_, row_, turn_, entries_;
};

// The block stores an item's finished rows: to `out` where the chunk's keys are one split, else, with their totals, to
// the chunk's partial results. Four numbers a thread.
template <typename T, typename Shape>
__device__ void store_item(const PagedAttention& p, const DecodeItem& item, const BlockSums<Shape>& all) {
    constexpr int D = Shape::kDim;
    const int rows = smaller(Shape::kRows, item.chunk.q_len * p.group - item.first_row);
    for (int i = threadIdx.x; i < rows * (D / 4); i += blockDim.x) {
        const int local = i / (D / 4), column = i % (D / 4) * 4, row = item.first_row + local;
        float4 sum = {};
#pragma unroll
        for (const auto& half : all.sums) {
            const float4 part = *reinterpret_cast<const float4*>(&half[local][column]);
            sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
        }
        const int token = item.chunk.token(row, p.group), head = blockIdx.x * p.group + row - token * p.group;
        const float2 totals = all.block[local];
        if (item.splits == 1) {
            const float norm = totals.y == 0 ? 0.f : 1 / totals.y;
            T* out = static_cast<T*>(p.out) + (int64_t(item.chunk.begin + token) * p.q_heads + head) * D + column;
            *reinterpret_cast<uint2*>(out) = {pack<T>(sum.x * norm, sum.y * norm), pack<T>(sum.z * norm, sum.w * norm)};
        } else {
            const int64_t at = part(p, item.chunk, item.split, token) * p.q_heads + head;
            *reinterpret_cast<float4*>(p.partial_out + at * D + column) = sum;
            if (column == 0) p.partial_sums[at] = {totals.x * p.scale_log2, totals.y};
        }
    }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    decode_kernel(const __grid_constant__ PagedAttention p) {
    constexpr int D = Shape::kDim;
    extern __shared__ __align__(128) unsigned char shared[];
    const int warp = threadIdx.x / 32;
    const uint32_t ring = shared_address(shared) + warp * Shape::kRingBytes;
    auto& all = *reinterpret_cast<BlockSums<Shape>*>(shared + Shape::kWarps * Shape::kRingBytes);

    if (!p.tables_ready) wait_for_earlier_kernels();
    KeyFeed<Shape> feed(p, all.list.items, ring);
    DecodeRows<T, D, Shape::kRowTiles> rows;
    const float slack = kSlack / p.scale_log2;
    int stage = 0, count = kListed;
    for (int first = blockIdx.y; count == kListed; first += kListed * gridDim.y) {
        count = list_items<Shape::kRows>(p, first, all.list);
        feed.start(count);
        wait_for_earlier_kernels();  // for queries, and the chunks' own keys and values
        let_next_kernel_start();     // not earlier: the merge kernel reads lengths without waiting
        if (count == 0) return;
        rows.load_queries(p, all.list.items[0]);  // ahead of the copies, which take longer
        for (int i = 0; i < Shape::kStages; ++i) feed.push();
        for (int i = 0; i < count; ++i) {
            const DecodeItem& item = all.list.items[i];
            if (i > 0) rows.load_queries(p, item);
            rows.clear(p, item);
            // Up to here every row sees every key, unless a window hides the first ones.
            const int clear = p.window > 0 ? 0 : item.chunk.position(item.first_token) + 1, end = item.end;
            for (int key = item.begin + warp * Shape::kKeys; key < end; key += Shape::kWarps * Shape::kKeys) {
                const uint32_t keys = ring + stage * Shape::kStageBytes, values = keys + Shape::kStageBytes / 2;
                const bool cut = key + Shape::kKeys > clear;
                wait_copies<Shape::kStages - 1>();
                if (cut) zero_outside<D>(values, key, item.low, end);
                __syncwarp();  // the other lanes' copies to this stage have arrived as well
                rows.multiply_keys(keys);
                if (cut) rows.hide(key, p.window);
                rows.weigh(p.scale_log2, slack);
                rows.add_values(values);
                __syncwarp();  // all lanes have read the stage that the feed fills next
                feed.push();
                stage = next_stage<Shape::kStages>(stage);
            }
            add_up(p, rows, all);
            store_item<T>(p, item, all);
        }
    }
}

template <typename T, typename Shape>
cudaError_t launch_decode(const PagedAttention& p, cudaStream_t stream) {
    const auto kernel = decode_kernel<T, Shape>;
    int device, processors;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) {
        return error;
    }
    if (const cudaError_t error = cudaFuncSetAttribute(
            reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes)) {
        return error;
    }
    // Of one KV head a chunk of n tokens has up to max(1, max_parts / n) splits and up to n times a token's row tiles.
    const int64_t items = (int64_t(p.chunks) * p.max_parts + p.tokens) * ceil_div(p.group, Shape::kRows);
    const int64_t slots = larger(processors * Shape::kBlocks / p.kv_heads, 1);
    const dim3 blocks(p.kv_heads, unsigned(items < slots ? items : slots));
    return launch_kernel(kernel, blocks, Shape::kThreads, Shape::kSharedBytes, stream, p);
}

// Chunks of 1 to p.decode_tokens tokens are attended to.
template <typename T, int D>
cudaError_t attend_short(const PagedAttention& p, cudaStream_t stream) {
    // Groups of more than 8 heads take 16 rows an item, except where their sums would not fit in registers or the head
    // dim is too rare to be worth a second kernel: there, two items read the same keys, the second one from L2.
    constexpr int kMostTiles = D > 128 || D == 96 ? 1 : 2;
    const auto launch =
        p.group <= 8 ? launch_decode<T, DecodeShape<D, 1>> : launch_decode<T, DecodeShape<D, kMostTiles>>;
    if (const cudaError_t error = launch(p, stream)) return error;
    if (p.max_parts == 1) return cudaSuccess;
    const int blocks = larger(smaller(kMergeBlocks / p.chunks, p.q_heads), 1);  // of a chunk
    return launch_kernel(merge_kernel<T, D>, dim3(blocks, p.chunks), MergeShape<D>::kThreads, 0, stream, p);
}

}  // namespace nanoinfer::cuda
