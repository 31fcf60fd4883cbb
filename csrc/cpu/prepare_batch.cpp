// One step's message applied to the table of requests, and the Batch written: all that a step knows comes from here.
//
// A few thousand integers at most, so no threads and no vectors. Everything is checked before anything is written.

#include <algorithm>

#include "../row_state.h"
#include "op.h"

namespace nanoinfer {
namespace {

constexpr const char* kOp = "prepare_batch";

struct Message {
    int64_t num_new, num_edits, num_chunks, num_tokens;
    const int32_t* new_rows;    // [num_new, 1 + kRowStateWidth] row, its initial state
    const int32_t* edits;       // [num_edits, 3] row, index, block
    const int32_t* chunks;      // [num_chunks, 4] row, start, end, flags
    const int32_t* new_tokens;  // [num_tokens], -1: the row's last token
};

struct Table {
    int32_t* row_state;     // [num_rows, kRowStateWidth]; the last row belongs to no request
    int32_t* block_tables;  // [num_rows, max_blocks]
    int32_t* slot_tokens;   // [num_slots]
    int64_t num_rows, max_blocks, num_slots, block_size;
};

struct Step {
    int32_t *tokens, *positions, *slots;  // [max_tokens]
    int32_t *q_starts, *kv_lens, *rows;   // [max_chunks + 1], [max_chunks], [max_chunks]
    int32_t *logit_rows, *sample_rows;    // [max_logits]
    int64_t max_tokens, max_chunks, max_logits;
};

struct Chunk {
    int32_t row, start, end, flags;
};

Chunk chunk_at(const Message& m, int64_t i) {
    const int32_t* c = m.chunks + 4 * i;
    return {c[0], c[1], c[2], c[3]};
}

void check_one(const char* what, int64_t i, const char* field, int64_t value, int64_t low, int64_t high) {
    if (value < low || value >= high) {
        require(false, kOp, ": ", field, " of ", what, " ", i, " must be in [", low, ", ", high, "), got ", value);
    }
}

void check_count(const char* what, int64_t count, int64_t limit) {
    require(count >= 0 && count <= limit, kOp, ": the number of ", what, " must be in [0, ", limit, "], got ", count);
}

void check_edits(const Message& m, const Table& t) {
    for (int64_t i = 0; i < m.num_new; ++i) {
        check_one("new row", i, "row", m.new_rows[i * (1 + kRowStateWidth)], 0, t.num_rows - 1);
    }
    for (int64_t i = 0; i < m.num_edits; ++i) {
        check_one("edit", i, "row", m.edits[3 * i], 0, t.num_rows - 1);
        check_one("edit", i, "index", m.edits[3 * i + 1], 0, t.max_blocks);
        check_one("edit", i, "block", m.edits[3 * i + 2], 0, t.num_slots / t.block_size);
    }
}

// A block that a chunk writes to is in the table, or will be once the edits, which are checked, are applied.
void check_block(const Message& m, const Table& t, int64_t i, int32_t row, int64_t index) {
    const int32_t block = t.block_tables[row * t.max_blocks + index];
    if (block >= 0 && block < t.num_slots / t.block_size) return;
    for (int64_t e = 0; e < m.num_edits; ++e) {
        if (m.edits[3 * e] == row && m.edits[3 * e + 1] == index) return;
    }
    check_one("chunk", i, "block", block, 0, t.num_slots / t.block_size);
}

void check_chunks(const Message& m, const Table& t, const Step& s) {
    int64_t tokens = 0, logits = 0;
    for (int64_t i = 0; i < m.num_chunks; ++i) {
        const Chunk c = chunk_at(m, i);
        check_one("chunk", i, "row", c.row, 0, t.num_rows - 1);
        check_one("chunk", i, "start", c.start, 0, t.max_blocks * t.block_size);
        check_one("chunk", i, "end", c.end, c.start + int64_t(1), t.max_blocks * t.block_size + 1);
        check_one("chunk", i, "flags", c.flags, 0, (kFlagSample | kFlagStore) + 1);
        tokens += c.end - c.start;
        logits += (c.flags & kFlagSample) != 0;
        if (!(c.flags & kFlagStore)) continue;
        for (int64_t index = c.start / t.block_size; index * t.block_size < c.end; ++index)
            check_block(m, t, i, c.row, index);
    }
    require(tokens == m.num_tokens, kOp, ": chunks must have as many tokens as the header says, ", m.num_tokens,
            ", got ", tokens);
    check_count("sampled chunks", logits, s.max_logits);
    for (int64_t i = 0; i < m.num_tokens; ++i) {
        check_one("token", i, "id", m.new_tokens[i], -1, int64_t(1) << 31);
    }
}

void apply_edits(const Message& m, const Table& t) {
    for (int64_t i = 0; i < m.num_new; ++i) {
        const int32_t* entry = m.new_rows + i * (1 + kRowStateWidth);
        for (int64_t j = 0; j < kRowStateWidth; ++j) t.row_state[entry[0] * int64_t(kRowStateWidth) + j] = entry[1 + j];
    }
    for (int64_t i = 0; i < m.num_edits; ++i) {
        t.block_tables[m.edits[3 * i] * t.max_blocks + m.edits[3 * i + 1]] = m.edits[3 * i + 2];
    }
}

void fill(int32_t* out, int64_t begin, int64_t end, int64_t value) {
    for (int64_t i = begin; i < end; ++i) out[i] = int32_t(value);
}

void pad(const Step& s, int64_t num_tokens, int64_t num_chunks, int64_t num_logits, int64_t scratch_row) {
    fill(s.tokens, num_tokens, s.max_tokens, 0);
    fill(s.positions, num_tokens, s.max_tokens, 0);
    fill(s.slots, num_tokens, s.max_tokens, -1);
    fill(s.q_starts, num_chunks, s.max_chunks + 1, num_tokens);
    fill(s.kv_lens, num_chunks, s.max_chunks, 0);
    fill(s.rows, num_chunks, s.max_chunks, scratch_row);
    fill(s.logit_rows, num_logits, s.max_logits, 0);
    fill(s.sample_rows, num_logits, s.max_logits, scratch_row);
}

// The chunk's tokens, which are [begin, begin + end - start) of the step.
void write_tokens(const Message& m, const Table& t, const Step& s, const Chunk& c, int64_t begin) {
    const int32_t last = t.row_state[c.row * int64_t(kRowStateWidth) + kLastToken];
    const int32_t* blocks = t.block_tables + c.row * t.max_blocks;
    for (int64_t position = c.start; position < c.end; ++position) {
        const int64_t i = begin + position - c.start;
        s.tokens[i] = m.new_tokens[i] < 0 ? last : m.new_tokens[i];
        s.positions[i] = int32_t(position);
        s.slots[i] = -1;
        if (!(c.flags & kFlagStore)) continue;
        const int64_t slot = blocks[position / t.block_size] * t.block_size + position % t.block_size;
        s.slots[i] = int32_t(slot);
        t.slot_tokens[slot] = s.tokens[i];
    }
}

void write_step(const Message& m, const Table& t, const Step& s) {
    int64_t begin = 0, num_logits = 0;
    for (int64_t r = 0; r < m.num_chunks; ++r) {
        const Chunk c = chunk_at(m, r);
        write_tokens(m, t, s, c, begin);
        s.q_starts[r] = int32_t(begin);
        s.kv_lens[r] = c.end;
        s.rows[r] = c.row;
        t.row_state[c.row * int64_t(kRowStateWidth) + kLength] = c.end;
        begin += c.end - c.start;
        if (!(c.flags & kFlagSample)) continue;
        s.logit_rows[num_logits] = int32_t(begin - 1);
        s.sample_rows[num_logits] = c.row;
        ++num_logits;
    }
    pad(s, m.num_tokens, m.num_chunks, num_logits, t.num_rows - 1);
}

// Data of an argument, once its dtype, shape and memory are as they should be.
int32_t* checked(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape, const Tensor& header) {
    Want(kOp, name, tensor).dtype(ScalarType::Int).shape(shape).dense(0).same_device(header);
    return ints(tensor);
}

void prepare_batch(const Tensor& header, const Tensor& new_rows, const Tensor& edits, const Tensor& chunks,
                   const Tensor& new_tokens, const Tensor& row_state, const Tensor& block_tables,
                   const Tensor& slot_tokens, const Tensor& tokens, const Tensor& positions, const Tensor& slots,
                   const Tensor& q_starts, const Tensor& kv_lens, const Tensor& rows, const Tensor& logit_rows,
                   const Tensor& sample_rows, int64_t block_size) {
    const int32_t* counts = checked("header", header, {4}, header);
    const Message message = {
        .num_new = counts[0],
        .num_edits = counts[1],
        .num_chunks = counts[2],
        .num_tokens = counts[3],
        .new_rows = checked("new_rows", new_rows, {-1, 1 + kRowStateWidth}, header),
        .edits = checked("edits", edits, {-1, 3}, header),
        .chunks = checked("chunks", chunks, {-1, 4}, header),
        .new_tokens = checked("new_tokens", new_tokens, {-1}, header),
    };
    const Table table = {
        .row_state = checked("row_state", row_state, {-1, kRowStateWidth}, header),
        .block_tables = checked("block_tables", block_tables, {row_state.size(0), -1}, header),
        .slot_tokens = checked("slot_tokens", slot_tokens, {-1}, header),
        .num_rows = row_state.size(0),
        .max_blocks = block_tables.size(1),
        .num_slots = slot_tokens.size(0),
        .block_size = block_size,
    };
    const Step step = {
        .tokens = checked("tokens", tokens, {-1}, header),
        .positions = checked("positions", positions, {tokens.size(0)}, header),
        .slots = checked("slots", slots, {tokens.size(0)}, header),
        .q_starts = checked("q_starts", q_starts, {rows.size(0) + 1}, header),
        .kv_lens = checked("kv_lens", kv_lens, {rows.size(0)}, header),
        .rows = checked("rows", rows, {-1}, header),
        .logit_rows = checked("logit_rows", logit_rows, {-1}, header),
        .sample_rows = checked("sample_rows", sample_rows, {logit_rows.size(0)}, header),
        .max_tokens = tokens.size(0),
        .max_chunks = rows.size(0),
        .max_logits = logit_rows.size(0),
    };
    require(block_size >= 1, kOp, ": block_size must be at least 1, got ", block_size);
    require(table.num_rows >= 1, kOp, ": row_state must have a last row for padding, got 0 rows");
    check_count("new rows", message.num_new, new_rows.size(0));
    check_count("edits", message.num_edits, edits.size(0));
    check_count("chunks", message.num_chunks, std::min(chunks.size(0), rows.size(0)));
    check_count("tokens", message.num_tokens, std::min(new_tokens.size(0), tokens.size(0)));
    check_edits(message, table);
    check_chunks(message, table, step);
    apply_edits(message, table);
    write_step(message, table, step);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CPU, m) { m.impl("prepare_batch", TORCH_BOX(&prepare_batch)); }

}  // namespace nanoinfer
