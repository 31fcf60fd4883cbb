// paged_attention on CUDA: checks, and the choice of kernels.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "../check.h"
#include "attention_decode.cuh"
#include "attention_float.cuh"
#include "attention_hopper.cuh"
#include "attention_prefill.cuh"

// Only torch's CUDA libraries have it: weak, so that one file loads beside a CPU build of torch as well.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

namespace nanoinfer::cuda {
namespace {

constexpr char kOp[] = "paged_attention";
// Chunks of up to so many tokens (a decoded one and drafts) are limited by reading K and V.
constexpr int kDecodeTokens = 8;

cudaStream_t current_stream(int device_index) {
    void* stream = nullptr;
    require(aoti_torch_get_current_cuda_stream(device_index, &stream) == 0, "no current CUDA stream");
    return static_cast<cudaStream_t>(stream);
}

Tensor new_floats(std::initializer_list<int64_t> sizes, const Tensor& like) {
    return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                                    ScalarType::Float);
}

void check_tensors(const Tensor& q, const Tensor& kv, const Tensor& q_starts, const Tensor& kv_lens, const Tensor& rows,
                   const Tensor& block_tables) {
    Want(kOp, "q", q).floating().shape({-1, -1, -1}).dense(1);
    Want(kOp, "kv", kv).dtype(q.scalar_type()).shape({-1, 2, -1, -1, q.size(2)}).dense(0).same_device(q);
    Want(kOp, "kv_lens", kv_lens).dtype(ScalarType::Int).shape({-1}).dense(0).same_device(q);
    const int64_t chunks = kv_lens.size(0);
    Want(kOp, "q_starts", q_starts).dtype(ScalarType::Int).shape({chunks + 1}).dense(0).same_device(q);
    Want(kOp, "rows", rows).dtype(ScalarType::Int).shape({chunks}).dense(0).same_device(q);
    Want(kOp, "block_tables", block_tables).dtype(ScalarType::Int).shape({-1, -1}).dense(1).same_device(q);
    // Copies take 16 bytes, and those are aligned.
    require(q.stride(0) * q.element_size() % 16 == 0 && reinterpret_cast<uintptr_t>(q.data_ptr()) % 16 == 0, kOp,
            ": q must have tokens at multiples of 16 bytes, got a stride of ", q.stride(0), " numbers");
}

void check_values(const Tensor& q, const Tensor& kv, double scale, int64_t window) {
    const int64_t heads = q.size(1), kv_heads = kv.size(2), block_size = kv.size(3);
    require(kv_heads > 0 && heads % kv_heads == 0, kOp, ": the heads of q must be a multiple of those of kv, got ",
            heads, " and ", kv_heads);
    // Copies and matrix instructions take 16 keys of half precision at a time.
    const int64_t least = q.scalar_type() == ScalarType::Float ? 1 : 16;
    require(block_size >= least && std::has_single_bit(uint64_t(block_size)), kOp,
            ": block size of kv must be a power of two from ", least, " on, got ", block_size);
    require(scale > 0 && std::isfinite(scale), kOp, ": scale must be positive and finite, got ", scale);
    require(window >= 0, kOp, ": window must be 0 or more, got ", window);
}

// Kernels count in 32 bits, and the second dimension of a grid has 16.
void check_limits(const Tensor& q, const Tensor& kv, const Tensor& kv_lens, const Tensor& block_tables) {
    const int64_t most = std::numeric_limits<int32_t>::max();
    const int64_t rows = q.size(0) * q.size(1), positions = block_tables.size(1) * kv.size(3);
    const int64_t keys = kv.size(0) * 2 * kv.size(2) * kv.size(3) / 16;
    require(rows <= most, kOp, ": q must have at most ", most, " tokens times heads, got ", rows);
    require(positions <= most, kOp, ": block_tables must have at most ", most, " positions a row, got ", positions);
    require(keys <= most, kOp, ": kv must have at most ", most, " times 16 keys and values, got ", keys);
    require(kv_lens.size(0) <= 65535, kOp, ": kv_lens must have at most 65535 chunks, got ", kv_lens.size(0));
    require(kv.size(0) > 0 && block_tables.size(0) > 0, kOp, ": kv and block_tables must not be empty, got ",
            kv.size(0), " blocks and ", block_tables.size(0), " rows");
}

PagedAttention make_params(const Tensor& q, const Tensor& kv, const Tensor& q_starts, const Tensor& kv_lens,
                           const Tensor& rows, const Tensor& block_tables, const Tensor& out, double scale,
                           int64_t window, bool tables_ready) {
    const int tokens = int(q.size(0)), chunks = int(kv_lens.size(0)), kv_heads = int(kv.size(2));
    const int positions = int(block_tables.size(1) * kv.size(3));
    const int splits = std::min(std::max(kMaxItems / kv_heads, 1), ceil_div(positions, kMinSplit));
    return {
        .q = q.data_ptr(),
        .kv = kv.data_ptr(),
        .q_starts = static_cast<const int32_t*>(q_starts.data_ptr()),
        .kv_lens = static_cast<const int32_t*>(kv_lens.data_ptr()),
        .rows = static_cast<const int32_t*>(rows.data_ptr()),
        .block_tables = static_cast<const int32_t*>(block_tables.data_ptr()),
        .out = out.data_ptr(),
        .partial_out = nullptr,
        .partial_sums = nullptr,
        .next_item = nullptr,
        .q_stride = q.stride(0),
        .table_stride = block_tables.stride(0),
        .tokens = tokens,
        .chunks = chunks,
        .q_heads = int(q.size(1)),
        .kv_heads = kv_heads,
        .blocks = int(kv.size(0)),
        .table_rows = int(block_tables.size(0)),
        .table_width = int(block_tables.size(1)),
        .group = int(q.size(1)) / kv_heads,
        .block_bits = std::countr_zero(uint64_t(kv.size(3))),
        .window = int(std::min<int64_t>(window, std::numeric_limits<int32_t>::max())),
        .max_parts = std::max(splits, 1),
        // With as many chunks as tokens every chunk is a decoded token, or nearly: the prefill kernel stays out.
        .decode_tokens = tokens == chunks ? tokens : kDecodeTokens,
        .scale = float(scale),
        .scale_log2 = float(scale * 1.4426950408889634),
        .tables_ready = tables_ready,
        .parts = nullptr,
    };
}

template <typename T, int D>
cudaError_t attend_half(const PagedAttention& p, cudaStream_t stream) {
    bool done = p.tokens <= p.decode_tokens;  // with the long chunks
    if constexpr (D == 64 || D == 128) {
        if (!done) {
            if (const cudaError_t error = attend_long_hopper<T, D>(p, stream, done)) return error;
        }
    }
    if (!done) {
        if (const cudaError_t error = attend_long<T, D>(p, stream)) return error;
    }
    return attend_short<T, D>(p, stream);
}

template <int D>
cudaError_t attend(ScalarType dtype, const PagedAttention& p, cudaStream_t stream) {
    switch (dtype) {
        case ScalarType::BFloat16:
            return attend_half<__nv_bfloat16, D>(p, stream);
        case ScalarType::Half:
            return attend_half<__half, D>(p, stream);
        default:
            return attend_float<D>(p, stream);
    }
}

cudaError_t attend(ScalarType dtype, int64_t head_dim, const PagedAttention& p, cudaStream_t stream) {
    switch (head_dim) {
        case 32:
            return attend<32>(dtype, p, stream);
        case 64:
            return attend<64>(dtype, p, stream);
        case 96:
            return attend<96>(dtype, p, stream);
        case 128:
            return attend<128>(dtype, p, stream);
        case 256:
            return attend<256>(dtype, p, stream);
    }
    require(false, kOp, ": head_dim must be 32, 64, 96, 128 or 256, got ", head_dim);
    return cudaErrorInvalidValue;
}

Tensor paged_attention(const Tensor& q, const Tensor& kv, const Tensor& q_starts, const Tensor& kv_lens,
                       const Tensor& rows, const Tensor& block_tables, double scale, int64_t window,
                       bool tables_ready) {
    check_tensors(q, kv, q_starts, kv_lens, rows, block_tables);
    check_values(q, kv, scale, window);
    const int device = q.device().index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const int64_t sizes[] = {q.size(0), q.size(1), q.size(2)};
    const Tensor out = torch::stable::new_empty(q, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 3));
    if (q.numel() == 0 || kv_lens.size(0) == 0) return out;
    check_limits(q, kv, kv_lens, block_tables);
    PagedAttention p = make_params(q, kv, q_starts, kv_lens, rows, block_tables, out, scale, window, tables_ready);
    const bool half = q.scalar_type() != ScalarType::Float, merges = half && p.max_parts > 1;
    const int64_t parts = merges ? int64_t(p.chunks) * p.max_parts : 0;
    const Tensor partial_out = new_floats({parts, p.q_heads, q.size(2)}, q);
    const Tensor partial_sums = new_floats({parts, p.q_heads, 2}, q);
    const Tensor next_item = new_floats({1}, q);
    const int long_parts = half ? most_parts(p, int(q.size(2))) : 0;
    const Tensor long_sums = new_floats({long_parts, part_float4s(int(q.size(2))), 4}, q);
    p.next_item = static_cast<int*>(next_item.data_ptr());
    p.parts = long_parts > 0 ? static_cast<float4*>(long_sums.data_ptr()) : nullptr;
    p.partial_out = static_cast<float*>(partial_out.data_ptr());
    p.partial_sums = static_cast<float2*>(partial_sums.data_ptr());
    const cudaError_t error = attend(q.scalar_type(), q.size(2), p, current_stream(device));
    require(error == cudaSuccess, kOp, ": ", cudaGetErrorString(error));
    return out;
}

}  // namespace
}  // namespace nanoinfer::cuda

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CUDA, m) {
    m.impl("paged_attention", TORCH_BOX(&nanoinfer::cuda::paged_attention));
}
