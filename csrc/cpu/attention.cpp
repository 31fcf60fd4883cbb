#include "attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "op.h"

namespace nanoinfer {
namespace {

constexpr const char* kOp = "paged_attention";

// What paged_attention and merge_splits share out among threads.
struct Plan {
    std::vector<AttentionTask> tasks, merges;
    int64_t partials = 0;   // floats
    int64_t tile_rows = 0;  // the most rows of a tile
};

void check_sizes(const Tensor& q, const Tensor& kv, double scale, int64_t window) {
    Want(kOp, "q", q).floating().shape({-1, -1, -1}).dense(1);
    Want(kOp, "kv", kv).dtype(q.scalar_type()).shape({-1, 2, -1, -1, q.size(2)}).dense(1).same_device(q);
    const int64_t heads = q.size(1), kv_heads = kv.size(2), dim = q.size(2);
    require(dim > 0 && dim % kColsStep == 0 && dim <= kMaxHeadDim, kOp, ": head_dim must be a multiple of ", kColsStep,
            " up to ", kMaxHeadDim, ", got ", dim);
    require(kv_heads > 0 && heads % kv_heads == 0, kOp, ": the heads of q must be a multiple of those of kv, got ",
            heads, " and ", kv_heads);
    require(kv.size(3) > 0, kOp, ": kv must have a block size of 1 or more, got ", kv.size(3));
    require(scale > 0 && std::isfinite(scale), kOp, ": scale must be positive and finite, got ", scale);
    require(window >= 0, kOp, ": window must be 0 or more, got ", window);
}

// Chunk by chunk, as a wrong number would be read as an address.
void check_chunk(const PagedAttention& p, int64_t chunk, int64_t tokens, const Tensor& block_tables, int64_t blocks) {
    const int64_t begin = p.q_starts[chunk], end = p.q_starts[chunk + 1], kv_len = p.kv_lens[chunk];
    require(0 <= begin && begin <= end && end <= tokens, kOp, ": q_starts must ascend from 0 to at most ", tokens,
            ", got ", begin, " and ", end, " for chunk ", chunk);
    if (begin == end) return;
    const int64_t row = p.rows[chunk], capacity = block_tables.size(1) * p.block_size;
    require(0 <= row && row < block_tables.size(0), kOp, ": rows[", chunk, "] must be in [0, ", block_tables.size(0),
            "), got ", row);
    require(end - begin <= kv_len && kv_len <= capacity, kOp, ": kv_lens[", chunk, "] must be at least the chunk's ",
            end - begin, " tokens and at most the block table's ", capacity, ", got ", kv_len);
    const int32_t* table = p.block_tables + row * p.table_stride;
    for (int64_t i = 0; i * p.block_size < kv_len; ++i) {
        require(0 <= table[i] && table[i] < blocks, kOp, ": block_tables[", row, "][", i, "] must be in [0, ", blocks,
                "), got ", table[i]);
    }
}

// A tile of a short chunk: each split is a task, and one merge puts them together.
void add_splits(Plan& plan, AttentionTask tile, int64_t size) {
    tile.partial = plan.partials;
    plan.merges.push_back(tile);
    for (int64_t split = tile.begin; split < tile.end; ++split, plan.partials += size) {
        AttentionTask task = tile;
        task.begin = split;
        task.end = split + 1;
        task.partial = plan.partials;
        plan.tasks.push_back(task);
    }
}

void add_chunk(Plan& plan, const PagedAttention& p, int64_t chunk) {
    const int64_t length = p.q_starts[chunk + 1] - p.q_starts[chunk], before = p.kv_lens[chunk] - length;
    const int64_t group = p.heads / p.kv_heads, tile_tokens = std::max<int64_t>(1, kTileRows / group);
    for (int64_t end = length; end > 0;) {
        const int64_t first = (end - 1) / tile_tokens * tile_tokens, rows = group * (end - first);
        AttentionTask tile = {
            .chunk = chunk,
            .kv_head = 0,
            .first = first,
            .tokens = end - first,
            .begin = std::max<int64_t>(0, before + first + 1 - p.window) / kSplitKeys,
            .end = (before + end - 1) / kSplitKeys + 1,
        };
        plan.tile_rows = std::max(plan.tile_rows, padded_rows(rows));
        for (; tile.kv_head < p.kv_heads; ++tile.kv_head) {
            const bool divide = length <= tile_tokens && tile.end - tile.begin > 1;
            divide ? add_splits(plan, tile, state_size(rows, p.head_dim)) : plan.tasks.push_back(tile);
        }
        end = first;
    }
}

Tensor empty_floats(int64_t count, const Tensor& like) {
    return torch::stable::new_empty(like, {&count, 1}, ScalarType::Float);
}

// Threads take tasks one after the other: their lengths differ.
void run(PagedAttention& p, const Plan& plan, const Tensor& like) {
    const int64_t workers = std::min<int64_t>(plan.tasks.size(), torch::stable::get_num_threads());
    Tensor scratch = empty_floats(workers * scratch_size(plan.tile_rows, p.head_dim), like);
    Tensor partials = empty_floats(plan.partials, like);
    int64_t next_task = 0;
    p.tasks = plan.tasks.data();
    p.num_tasks = plan.tasks.size();
    p.next_task = &next_task;
    p.merges = plan.merges.data();
    p.partials = static_cast<float*>(partials.data_ptr());
    p.scratch = static_cast<float*>(scratch.data_ptr());
    p.tile_rows = plan.tile_rows;
    torch::stable::parallel_for(0, workers, 1, [&](int64_t i, int64_t end) { kernels().paged_attention(p, i, end); });
    const int64_t row_size = plan.merges.empty() ? 1 : plan.partials / int64_t(plan.merges.size());
    run_rows(kernels().merge_splits, p, plan.merges.size(), row_size);
}

Tensor paged_attention(const Tensor& q, const Tensor& kv, const Tensor& q_starts, const Tensor& kv_lens,
                       const Tensor& rows, const Tensor& block_tables, double scale, int64_t window,
                       bool /* tables_ready: every op has ended when the next one begins */) {
    check_sizes(q, kv, scale, window);
    Want(kOp, "kv_lens", kv_lens).dtype(ScalarType::Int).shape({-1}).dense(0).same_device(q);
    const int64_t chunks = kv_lens.size(0);
    Want(kOp, "q_starts", q_starts).dtype(ScalarType::Int).shape({chunks + 1}).dense(0).same_device(q);
    Want(kOp, "rows", rows).dtype(ScalarType::Int).shape({chunks}).dense(0).same_device(q);
    Want(kOp, "block_tables", block_tables).dtype(ScalarType::Int).shape({-1, -1}).dense(1).same_device(q);
    Tensor out = empty({q.size(0), q.size(1), q.size(2)}, q);
    PagedAttention p = {
        .dtype = dtype_of(q),
        .q = q.data_ptr(),
        .kv = kv.data_ptr(),
        .out = out.data_ptr(),
        .q_starts = ints(q_starts),
        .kv_lens = ints(kv_lens),
        .rows = ints(rows),
        .block_tables = ints(block_tables),
        .heads = q.size(1),
        .kv_heads = kv.size(2),
        .head_dim = q.size(2),
        .block_size = kv.size(3),
        .q_stride = q.stride(0),
        .block_stride = kv.stride(0),
        .table_stride = block_tables.stride(0),
        .window = window ? window : INT64_MAX / 2,
        .scale = float(scale),
    };
    Plan plan;
    // Chunks of a step come short ones first and a chunk's last tile is its longest: hand out the long ones first.
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        check_chunk(p, chunk, q.size(0), block_tables, kv.size(0));
        add_chunk(plan, p, chunk);
    }
    run(p, plan, q);
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CPU, m) { m.impl("paged_attention", TORCH_BOX(&paged_attention)); }

}  // namespace nanoinfer
