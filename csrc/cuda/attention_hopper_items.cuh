#pragma once
// What the blocks of attention_hopper.cuh work on: whole items, or shares of them.
//
// Few items leave multiprocessors idle: 192 of them take 132 multiprocessors two rounds, in the second of which more
// than half do nothing. Hence shares: all items' tiles of keys stand in line, item after item, and each block takes an
// equal stretch, which may end one item, have others as a whole, and begin another. What two or more blocks have
// computed of an item is added up by attention_hopper_parts.cuh, always in the same order; but where parts begin, and
// so results' last bits, depends on the whole step. Blocks of both kernels work the shares out for themselves, from the
// chunks' lengths in closed form, so that nothing has to be planned before they start, or handed out while they run.

#include "attention_hopper_rows.cuh"

namespace nanoinfer::cuda {

// A tile takes a multiprocessor 1.4 us with heads of 64, 2 us with heads of 128. To begin and end an item takes up to 6
// us more, which counts as so many tiles: without them, a share of many short items would take the longest.
constexpr int kItemTiles = 3;
// Tiles that shares have to save a step for its blocks to take shares: they begin and end one or two items more each,
// and to add parts up takes some 5 us.
constexpr int kLeastGain = 6;
// Tiles of a share: with shorter ones a chunk of few tokens would leave more parts to add up than it saves.
constexpr int kLeastShare = 8;
// Tiles in line, so that sums of them are numbers of 32 bits whatever the lengths. More of them keep all blocks busy.
constexpr int kMostTiles = 1 << 24;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct HopperItem {
    PrefillItem item;
    int first, tiles;  // its first tile's first key; none where no row sees a key
    bool done;         // no item: there are no more
};

// All of the rows' tiles of keys.
template <typename Shape>
__device__ HopperItem hopper_item(const PagedAttention& p, const Chunk& chunk, int local) {
    const PrefillItem item = prefill_item<Shape::kRows>(p, chunk, local);
    const int first = item.low / Shape::kKeys * Shape::kKeys;
    return {item, first, ceil_div(larger(item.end - first, 0), Shape::kKeys), false};
}

// A place in a chunk's line of tiles: the number of its item, which of the item's tiles it is, and of how many. The
// first kItemTiles of them stand for the item's beginning and end.
struct LinePlace {
    int item, tile, tiles;
};

// The line of a chunk, item after item in the order of prefill_item(), without a window. Tile of rows i sees all keys
// up to its last row's, ceil((position + 1) / kTile) tiles; as tiles of rows have kTile too, this is a quotient that
// grows by 1 every group_ tiles, whose sums have a closed form. But the last tile of rows may be short.
template <int kTile>
class ChunkLine {
  public:
    __device__ ChunkLine(const PagedAttention& p, const Chunk& chunk) : group_(p.group), kv_heads_(p.kv_heads) {
        const int before = larger(chunk.position(0), 0);  // less than 0 if the numbers are wrong
        shift_ = (group_ * (before + kTile) + kTile - 1) / kTile + kItemTiles * group_;
        row_tiles_ = ceil_div(chunk.q_len * group_, kTile);
        last_ = ceil_div(before + chunk.q_len, kTile) + kItemTiles;
    }

    __device__ int items() const { return row_tiles_ * kv_heads_; }
    __device__ int tiles() const { return from(0) * kv_heads_; }
    __device__ int shortest() const { return length(0); }
    __device__ int longest() const { return last_; }

    __device__ LinePlace find(int at) const {
        int low = 0, high = row_tiles_ - 1;  // the tile of rows is one of these
        while (low < high) {
            const int middle = (low + high) / 2;
            if (from(middle + 1) <= at / kv_heads_) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        const int rest = at - from(low + 1) * kv_heads_, tiles = length(low);
        return {(row_tiles_ - 1 - low) * kv_heads_ + rest / tiles, rest % tiles, tiles};
    }

  private:
    // Tiles in line of one KV head's tile of rows i, and of those from i on.
    __device__ int length(int i) const { return i < row_tiles_ - 1 ? (i + shift_) / group_ : last_; }
    __device__ int from(int i) const {
        return i < row_tiles_ ? int(below(row_tiles_ - 1 + shift_) - below(i + shift_)) + last_ : 0;
    }
    // The sum of i / group_, rounded down, over all i < n; modulo 2^32, as differences are all that is needed.
    __device__ unsigned below(int n) const {
        const unsigned whole = n / group_;
        return whole * (whole - 1) / 2 * group_ + n % group_ * whole;
    }

    const int group_, kv_heads_;
    int shift_, row_tiles_, last_;
};

// Tiles in line of one chunk.
template <int kTile>
__device__ int line_tiles(const PagedAttention& p, const Chunk& chunk) {
    return chunk.q_len > p.decode_tokens ? ChunkLine<kTile>(p, chunk).tiles() : 0;
}

// How a step's line is shared out: block b takes the `size` tiles from b * size on, of `total`. 0: whole items.
struct Shares {
    int size, total;
};

// The shares of a launch of gridDim.x blocks, for a warp. Whole items take as long as the longest one, or leave the
// blocks idle that get none in the last round, for about the time of one of the shortest: a chunk's items are taken
// in descending order, which makes up for their lengths.
template <typename Shape>
__device__ Shares share_out(const PagedAttention& p) {
    static_assert(Shape::kRows == Shape::kKeys);
    const int blocks = gridDim.x;
    int items = 0, total = 0, shortest = 0, longest = 0;
    for (int index = threadIdx.x % 32; index < p.chunks; index += 32) {
        LoadedChunk loaded;
        load_chunk(p, index, loaded);
        const Chunk chunk = loaded.check(p, index);
        if (chunk.q_len <= p.decode_tokens) continue;
        const ChunkLine<Shape::kKeys> line(p, chunk);
        items += line.items();
        total = smaller(total + line.tiles(), kMostTiles);
        shortest = smaller(shortest + line.items() * line.shortest(), kMostTiles);
        longest = larger(longest, line.longest());
    }
    __syncwarp();
    items = __reduce_add_sync(kAllLanes, items), total = __reduce_add_sync(kAllLanes, total);
    shortest = __reduce_add_sync(kAllLanes, shortest), longest = __reduce_max_sync(kAllLanes, longest);
    const int size = larger(ceil_div(total, blocks), kLeastShare);
    const int idle = ceil_div(items, blocks) * blocks - items;
    const int gain = larger(longest - size, idle * (shortest / larger(items, 1)) / blocks);
    return {gain >= kLeastGain && total < kMostTiles ? size : 0, total};
}

// The share of a block, as items of which it takes all tiles or some, and always at least one. Each warp that copies
// queries walks it by itself.
template <typename Shape>
class ShareWalk {
    static constexpr int kTile = Shape::kKeys;

  public:
    __device__ ShareWalk(const PagedAttention& p, const Shares& shares)
        : p_(p), finder_(p), at_(blockIdx.x * shares.size), end_(smaller(at_ + shares.size, shares.total)) {}

    __device__ HopperItem next() {
        Chunk chunk;
        int local;
        while (at_ < end_ && finder_.find(at_, chunk, local)) {
            const LinePlace place = ChunkLine<kTile>(p_, chunk).find(local);
            const int stop = smaller(place.tile + end_ - at_, place.tiles);
            at_ += stop - place.tile;
            const PrefillItem item = prefill_item<kTile>(p_, chunk, place.item);
            const int first = larger(place.tile - kItemTiles, 0);
            // Wrong numbers may put tiles in line that are not there.
            const int tiles = smaller(stop - kItemTiles, ceil_div(item.end, kTile)) - first;
            if (tiles > 0) return {item, first * kTile, tiles, false};
        }
        return {.done = true};
    }

  private:
    const PagedAttention& p_;
    Finder<line_tiles<kTile>> finder_;
    int at_, end_;  // in line
};

#endif

}  // namespace nanoinfer::cuda
