#pragma once
// Attention of long chunks on Hopper (sm_90a): its asynchronous matrix products (wgmma) and bulk tensor copies
// (FlashAttention-3, Shah et al., 2024). Items are those of attention_prefill.cuh.
//
// There is a block on each multiprocessor, of three warpgroups of 128 threads. One warp of the first warpgroup copies
// tiles of keys and of values to a ring of slots in shared memory, the others find the block's items and copy their
// queries; the other warpgroups each take 64 of an item's rows. While the tensor cores add up one tile's values, and
// multiply the next one's keys, a warpgroup weighs scores, or the other one does. Tiles go through the ring in the
// order in which they are used: keys 0, keys 1, values 0, keys 2, values 1, ..., the last values.
//
// A block takes the next item when its last one nears its end: items differ too much in length to be handed out
// beforehand (of four prompts of 4k, 12 heads of 128, that left multiprocessors idle for a sixth of the time), or to be
// taken long before. Where there are few items, another kernel may give the blocks equal shares of all items' keys
// instead, see attention_hopper_items.cuh. To have one kernel for both cost steps of many items 4 to 10%.

#include "attention_hopper_parts.cuh"
#include "tensor_map.cuh"

namespace nanoinfer::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Barriers of a block are numbered: 0 is __syncthreads, warpgroups 1 and 2 meet at theirs.
constexpr int kQueryMeeting = 3;
// An item is taken when so many tiles of keys of the one before are still to be copied. What the ring holds by then
// keeps the tensor cores busy for 4 us, and finding a whole item and copying its queries takes 2.
constexpr int kAhead = 2;

// What a block has in shared memory beside tiles and queries. Where all threads of a warp have read what others write
// next, each of them arrives: one's word for all would do, as a warp reads in order, but racecheck could not see it.
template <typename Shape>
struct HopperShared {
    uint64_t full[Shape::kSlots], empty[Shape::kSlots];  // barriers of the ring
    uint64_t wanted;  // the tiles' warp's word that it has read an item, and will soon be through with it
    uint64_t found[2], queries_full[2], queries_empty[2];
    HopperItem items[2];  // with the queries
    int numbers[2];       // theirs, among all items, if these are whole

    __device__ void init() {
        for (int i = 0; i < Shape::kSlots; ++i) {
            init_barrier(shared_address(&full[i]), 1);                    // the copying warp's arrival, and bytes
            init_barrier(shared_address(&empty[i]), 4 * Shape::kGroups);  // the other warpgroups' warps
        }
        for (int i = 0; i < 2; ++i) {
            init_barrier(shared_address(&found[i]), 1);  // whoever writes the item
            init_barrier(shared_address(&queries_full[i]), Shape::kQueryThreads);
            init_barrier(shared_address(&queries_empty[i]), 128 * Shape::kGroups);
        }
        init_barrier(shared_address(&wanted), 32);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
};

// A place in a ring of n and which time round it is.
template <int n>
struct Turn {
    int index = 0, parity = 0;

    __device__ void advance() {
        if (++index == n) index = 0, parity ^= 1;
    }
};

// The items of a block's share. Thread 0 alone waits until one is wanted, as it alone writes it: another thread could
// come to the barrier when it is a phase further, and wait for ever.
template <typename Shape>
class WantedShares {
  public:
    __device__ WantedShares(const PagedAttention& p, const Shares& shares, HopperShared<Shape>& all, int thread)
        : walk_(p, shares), all_(all), thread_(thread) {}

    __device__ HopperItem next() {
        const HopperItem item = walk_.next();
        if (thread_ == 0) wait_barrier(shared_address(&all_.wanted), odd_ ^ 1);
        odd_ ^= 1;
        return item;
    }

  private:
    ShareWalk<Shape> walk_;
    HopperShared<Shape>& all_;
    const int thread_;  // of the three warps' threads
    int odd_ = 0;       // has the block taken an odd number of items: also the parity of `wanted`
};

// The whole items of a block, as many as it gets round to. All threads that copy queries call next(), and get the same.
template <typename Shape>
class WholeWalk {
  public:
    __device__ WholeWalk(const PagedAttention& p, HopperShared<Shape>& all, int thread)
        : p_(p), all_(all), finder_(p), thread_(thread) {}

    __device__ HopperItem next() {
        wait_barrier(shared_address(&all_.wanted), odd_ ^ 1);  // until then another block may have it
        int& number = all_.numbers[odd_];                      // two in turn: warps may still read the last one
        if (thread_ == 0) number = atomicAdd(p_.next_item, 1);
        sync_threads<Shape::kQueryThreads>(kQueryMeeting);  // the number is there
        odd_ ^= 1;
        Chunk chunk;
        int local;
        if (!finder_.find(number, chunk, local)) return {.done = true};
        return hopper_item<Shape>(p_, chunk, local);
    }

  private:
    const PagedAttention& p_;
    HopperShared<Shape>& all_;
    Finder<prefill_items<Shape::kRows>> finder_;
    const int thread_;  // of the three warps' threads
    int odd_ = 0;       // has the block taken an odd number of items: also the parity of `wanted`
};

// Three warps: find the items, as `walk` has them, and copy their queries to two places in turn. A place is free when
// the other warpgroups are through with its item, and the warp that copies tiles has said that it wants the next.
template <typename T, int D, typename Walk>
__device__ void copy_all_queries(const PagedAttention& p, Walk walk, int thread, HopperShared<HopperShape<D>>& all,
                                 uint32_t queries) {
    using Shape = HopperShape<D>;
    Turn<2> turn;
    for (bool more = true; more; turn.advance()) {
        wait_barrier(shared_address(&all.queries_empty[turn.index]), turn.parity ^ 1);
        const HopperItem next = walk.next();
        more = !next.done;
        if (thread == 0) {
            all.items[turn.index] = next;
            arrive(shared_address(&all.found[turn.index]));
        }
        const uint32_t tile = queries + turn.index * Shape::kQueryBytes;
        if (more) copy_queries<T, D>(p, next.item, Shape::kRows, thread, Shape::kQueryThreads, tile);
        commit_copies();
        wait_copies<0>();
        arrive(shared_address(&all.queries_full[turn.index]));
    }
}

// Three warps: the same, of the block's share, or of whole items.
template <typename T, int D, bool kShares>
__device__ void find_all_queries(const PagedAttention& p, HopperShared<HopperShape<D>>& all, uint32_t queries) {
    using Shape = HopperShape<D>;
    const int thread = threadIdx.x - 32;
    if constexpr (kShares) {
        const Shares shares = share_out<Shape>(p);
        if (shares.size > 0) {
            return copy_all_queries<T, D>(p, WantedShares<Shape>(p, shares, all, thread), thread, all, queries);
        }
    }
    copy_all_queries<T, D>(p, WholeWalk<Shape>(p, all, thread), thread, all, queries);
}

// One warp: copies all items' tiles. Lane l copies panel l / 8 of the 16 keys l % 8 of a tile.
template <int D>
__device__ void copy_all_tiles(const PagedAttention& p, const CUtensorMap& map, HopperShared<HopperShape<D>>& all,
                               uint32_t slots) {
    using Shape = HopperShape<D>;
    const int lane = threadIdx.x % 32, group = lane % 8, panel = lane / 8, values = p.kv_heads << p.block_bits;
    Turn<Shape::kSlots> slot;
    const auto copy = [&](int row) {
        wait_barrier(shared_address(&all.empty[slot.index]), slot.parity ^ 1);
        const uint32_t full = shared_address(&all.full[slot.index]);
        if (lane == 0) arrive_expecting(full, Shape::kTileBytes);
        __syncwarp();  // the barrier expects bytes before the first arrive
        const uint32_t to = slots + slot.index * Shape::kTileBytes + panel * Shape::kPanelBytes + group * 16 * 128;
        if (panel < Shape::kPanels) copy_box(to, map, panel * 64, row, full);
        slot.advance();
    };
    for (Turn<2> turn;; turn.advance()) {
        wait_barrier(shared_address(&all.found[turn.index]), turn.parity);
        const HopperItem next = all.items[turn.index];
        if (next.done) break;
        if (next.tiles < kAhead) arrive(shared_address(&all.wanted));
        int row = 0;
        for (int tile = 0; tile < next.tiles; ++tile) {
            if (tile + kAhead == next.tiles) arrive(shared_address(&all.wanted));
            // Behind the end come the last keys again, to be hidden.
            const int key = smaller(next.first + tile * Shape::kKeys + group * 16, (next.item.end - 1) & ~15);
            const int previous = row;
            row = int(key_row(p, *table_entry(p, next.item.chunk.row, key), next.item.head, key));
            copy(row);
            if (tile > 0) copy(previous + values);
        }
        if (next.tiles > 0) copy(row + values);
    }
}

// The ring of tiles as those see it who use them.
template <typename Shape>
struct TileRing {
    HopperShared<Shape>& all;
    const uint32_t slots;
    Turn<Shape::kSlots> turn = {};

    // Waits for the next tile.
    __device__ uint32_t next() const {
        wait_barrier(shared_address(&all.full[turn.index]), turn.parity);
        return slots + turn.index * Shape::kTileBytes;
    }
    // Goes on to the tile after that; returns its slot.
    __device__ int advance() {
        const int slot = turn.index;
        turn.advance();
        return slot;
    }
    // This warp is through with a slot.
    __device__ void release(int slot) const {
        if (threadIdx.x % 32 == 0) arrive(shared_address(&all.empty[slot]));
    }
};

// A warpgroup's work on an item: its 64 rows, of which this warp has 16, from the item's row `own` on. `tile` has their
// queries, and then their results. (Arrays stay in registers only as variables of one function.)
template <typename T, int D, bool kShares>
__device__ void attend_rows(const PagedAttention& p, const HopperItem& next, int own, unsigned char* tile,
                            TileRing<HopperShape<D>>& ring) {
    constexpr int kKeys = HopperShape<D>::kKeys;
    const PrefillItem& item = next.item;  // stays in shared memory
    const float slack = kSlack / p.scale_log2;
    uint32_t queries[D / 16][4], weights[kKeys / 16][4];
    load_queries<D>(queries, shared_address(tile));
    QueryRows<T, D, 1, kKeys> rows;
    rows.clear();
    int positions[1][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        positions[0][i] = item.chunk.position(item_row(p, item, own + threadIdx.x % 32 / 4 + 8 * i).token);
    }
    float shrink[2];  // of what was summed up before the last tile
    const auto weigh = [&](int key) {
        const bool cut = key + kKeys > item.first + 1 || (p.window > 0 && key <= item.last - p.window);
        if (cut) rows.hide(positions, key, p.window);
        return weigh_scores(rows, shrink, p.scale_log2, slack);
    };
    const auto add_values = [&](int key) {
        const uint32_t values = ring.next();
        if (key < item.low || key + kKeys > item.end) zero_rows<D>(values, key, item.low, item.end);
        start_values<T, D>(rows, weights, values);
        return ring.advance();
    };
    const auto end_values = [&](int slot) {
        wait_products<0>();
        settle(rows.out[0]);
        ring.release(slot);
    };

    int key = next.first;
    const int end = key + next.tiles * kKeys;
    if (key < end) {
        start_scores<T, D>(rows, queries, ring.next());
        wait_products<0>();
        settle(rows.scores[0]);
        ring.release(ring.advance());
        weigh(key);
        round_weights<T, D>(rows, weights);
    }
    for (; key + kKeys < end; key += kKeys) {
        start_scores<T, D>(rows, queries, ring.next());
        const int keys_slot = ring.advance(), values_slot = add_values(key);
        wait_products<1>();  // the scores are there
        settle(rows.scores[0]);
        ring.release(keys_slot);
        const bool grown = weigh(key + kKeys);
        // Never true, but a branch that waits for the weights: else the compiler makes them behind the next wait.
        if (__any_sync(kAllLanes, rows.sums[0][0] + rows.sums[0][2] < 0)) asm volatile("nanosleep.u32 0;");
        end_values(values_slot);
        if (grown) shrink_sums(rows, shrink);
        round_weights<T, D>(rows, weights);
    }
    if (key < end) end_values(add_values(key));
    if (kShares && is_part<HopperShape<D>>(next)) return store_part<D>(p, next, rows);
    add_lanes(rows);
    store_rows<T, D, 1>(p, item, rows, own, tile);
}

// What a block of either kernel does.
template <typename T, int D, bool kShares>
__device__ void attend_items(const PagedAttention& p, const CUtensorMap& map, HopperShared<HopperShape<D>>& all) {
    using Shape = HopperShape<D>;
    extern __shared__ __align__(128) unsigned char shared[];
    unsigned char* slots = shared + (-shared_address(shared) & 1023);
    unsigned char* queries = slots + Shape::kSlots * Shape::kTileBytes;
    if (threadIdx.x == 0) all.init();
    __syncthreads();  // the barriers are there

    const int warp = threadIdx.x / 32;
    if (warp < 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Shape::kCopyRegisters));
        if (warp == 0) copy_all_tiles<D>(p, map, all, shared_address(slots));
        if (warp >= 1) find_all_queries<T, D, kShares>(p, all, shared_address(queries));
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Shape::kMathRegisters));
        TileRing<Shape> ring = {all, shared_address(slots)};
        const int own = (warp - 4) * 16;
        for (Turn<2> turn;; turn.advance()) {
            wait_barrier(shared_address(&all.queries_full[turn.index]), turn.parity);
            const HopperItem& next = all.items[turn.index];
            if (next.done) break;
            attend_rows<T, D, kShares>(p, next, own, queries + turn.index * Shape::kQueryBytes + own * D * 2, ring);
            __syncwarp();  // the warp is as one again, as its next item's instructions need it
            arrive(shared_address(&all.queries_empty[turn.index]));
        }
    }
}

#endif

// The kernel for many items. (Not a template with kShares: ptxas orders instructions by a kernel's name as well.)
template <typename T, int D>
__global__ void __launch_bounds__(HopperShape<D>::kThreads, 1)
    hopper_kernel(const __grid_constant__ PagedAttention p, const __grid_constant__ CUtensorMap map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __shared__ HopperShared<HopperShape<D>> all;
    attend_items<T, D, false>(p, map, all);
#endif
}

// The kernel for few items. It starts when all earlier kernels have ended, and add_parts_kernel, which follows it,
// takes multiprocessors as soon as blocks leave them.
template <typename T, int D>
__global__ void __launch_bounds__(HopperShape<D>::kThreads, 1)
    shares_kernel(const __grid_constant__ PagedAttention p, const __grid_constant__ CUtensorMap map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    let_next_kernel_start();
    __shared__ HopperShared<HopperShape<D>> all;
    attend_items<T, D, true>(p, map, all);
#endif
}

// The cache as rows of D numbers, copied in boxes of 16 rows. False where the driver cannot.
template <typename T, int D>
bool describe_cache(const PagedAttention& p, CUtensorMap& map) {
    const int64_t rows = int64_t(p.blocks) * 2 * p.kv_heads << p.block_bits;
    return rows <= 0x7fffffff && describe_matrix<T>(map, p.kv, rows, D, D, 16);
}

// Launches the kernels where the GPU has them: `launched` says whether.
template <typename T, int D>
cudaError_t attend_long_hopper(const PagedAttention& p, cudaStream_t stream, bool& launched) {
    using Shape = HopperShape<D>;
    const bool shares = p.parts != nullptr;
    const auto kernel = shares ? shares_kernel<T, D> : hopper_kernel<T, D>;
    const auto function = reinterpret_cast<const void*>(kernel);
    cudaFuncAttributes compiled;
    if (const cudaError_t error = cudaFuncGetAttributes(&compiled, function)) return error;
    CUtensorMap map;
    // Compiled for another GPU the kernel is empty, and has no barriers in shared memory.
    launched = compiled.sharedSizeBytes > 0 && describe_cache<T, D>(p, map);
    const int64_t items = prefill_tiles(p, Shape::kRows) * p.kv_heads;
    if (!launched || items == 0) return cudaSuccess;
    if (const cudaError_t error =
            cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes)) {
        return error;
    }
    if (const cudaError_t error = cudaMemsetAsync(p.next_item, 0, sizeof(int), stream)) return error;
    const int processors = hopper_processors();
    const unsigned blocks = unsigned(shares || items > processors ? processors : items);
    kernel<<<blocks, Shape::kThreads, Shape::kSharedBytes, stream>>>(p, map);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess || !shares) return error;
    return launch_kernel(add_parts_kernel<T, D>, dim3(blocks, D / kSliceColumns), kPartThreads, 0, stream, p);
}

}  // namespace nanoinfer::cuda
