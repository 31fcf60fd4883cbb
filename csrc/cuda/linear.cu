#include "activation.cuh"
#include "linear.cuh"
#include "linear_gated.cuh"
#include "linear_tile.cuh"
#include "op.h"

namespace nanoinfer {
namespace {

void check(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    Want(op, "x", x).floating().shape({-1, -1}).dense(1);
    require(x.size(1) <= cuda::kMaxInputs, op, ": x must have at most ", cuda::kMaxInputs, " columns, got ", x.size(1));
    Want(op, "weight", weight).dtype(x.scalar_type()).shape({-1, x.size(1)}).dense(1).same_device(x);
    if (bias) Want(op, "bias", *bias).dtype(x.scalar_type()).shape({weight.size(0)}).dense(0).same_device(x);
}

void check_gates(const char* op, const Tensor& weight) {
    require(weight.size(0) % 2 == 0, op, ": weight must have an even number of rows, got ", weight.size(0));
}

void check_thin(const char* op, const Tensor& x) {
    require(x.size(0) <= cuda::kThinRows, op, ": x must have at most ", cuda::kThinRows, " rows, got ", x.size(0));
}

// Any number of rows, kThinRows at a time.
Tensor by_thin_rows(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    bool float_out, bool gated = false) {
    const int64_t out_dim = gated ? weight.size(0) / 2 : weight.size(0);
    Tensor out = empty({x.size(0), out_dim}, x, float_out ? ScalarType::Float : x.scalar_type());
    const cuda::ThinLinear params = {
        .x = x.data_ptr(),
        .weight = weight.data_ptr(),
        .bias = bias ? bias->data_ptr() : nullptr,
        .out = out.data_ptr(),
        .rows = int(x.size(0)),
        .dim = x.size(1),
        .out_dim = out_dim,
        .x_stride = x.stride(0),
        .weight_stride = weight.stride(0),
        .float_out = float_out,
        .kind = gated ? cuda::ThinKind::kGated : cuda::ThinKind::kPlain,
    };
    with_type(x, [&](auto number) { launch(op, x, cuda::thin_linears<decltype(number)>, params); });
    return out;
}

Tensor thin_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool float_out) {
    check("thin_linear", x, weight, bias);
    check_thin("thin_linear", x);
    return by_thin_rows("thin_linear", x, weight, bias, float_out);
}

Tensor silu_and_mul(const char* op, const Tensor& x) {
    Tensor out = empty({x.size(0), x.size(1) / 2}, x);
    const cuda::SiluAndMul params = {x.data_ptr(), out.data_ptr(), out.size(0), out.size(1), x.stride(0)};
    with_type(x, [&](auto number) { launch(op, x, cuda::silu_and_mul<decltype(number)>, params); });
    return out;
}

Tensor gated_by_thin_rows(const char* op, const Tensor& x, const Tensor& weight) {
    if (x.scalar_type() != ScalarType::Float) return by_thin_rows(op, x, weight, std::nullopt, false, true);
    return silu_and_mul(op, by_thin_rows(op, x, weight, std::nullopt, false));
}

Tensor thin_gated_linear(const Tensor& x, const Tensor& weight) {
    const char* op = "thin_gated_linear";
    check(op, x, weight, std::nullopt);
    check_gates(op, weight);
    check_thin(op, x);
    return gated_by_thin_rows(op, x, weight);
}

// What becomes of a row's queries, keys and values.
cuda::RotaryStoreKv rotation(const char* op, const Tensor& x, const Tensor& weight, const Tensor& kv,
                             const Tensor& positions, const Tensor& slots, const Tensor& cos_sin) {
    Want(op, "kv", kv).dtype(x.scalar_type()).shape({-1, 2, -1, -1, -1}).dense(0).same_device(x);
    Want(op, "positions", positions).dtype(ScalarType::Int).shape({x.size(0)}).dense(0).same_device(x);
    Want(op, "slots", slots).dtype(ScalarType::Int).shape({x.size(0)}).dense(0).same_device(x);
    const int64_t kv_heads = kv.size(2), head_dim = kv.size(4);
    Want(op, "cos_sin", cos_sin).dtype(ScalarType::Float).shape({-1, head_dim}).dense(0).same_device(x);
    require(head_dim > 0 && head_dim % 2 == 0, op, ": kv must have heads of an even size, got ", head_dim);
    const int64_t heads = weight.size(0) / head_dim;
    require(weight.size(0) <= cuda::kMaxRotatedRows, op, ": weight must have at most ", cuda::kMaxRotatedRows,
            " rows, got ", weight.size(0));
    require(weight.size(0) % head_dim == 0 && heads >= 2 * kv_heads, op, ": weight must have rows for whole heads, ",
            2 * kv_heads, " of ", head_dim, " for kv among them, got ", weight.size(0));
    return {
        .kv = kv.data_ptr(),
        .tokens = x.size(0),
        .q_heads = int(heads - 2 * kv_heads),
        .kv_heads = int(kv_heads),
        .head_dim = int(head_dim),
        .block_size = int(kv.size(3)),
        .q_stride = (heads - 2 * kv_heads) * head_dim,
        .num_slots = kv.size(0) * kv.size(3),
        .slots = ints(slots),
        .positions = ints(positions),
        .cos_sin = static_cast<const float*>(cos_sin.data_ptr()),
        .num_positions = cos_sin.size(0),
        .rotary_dim = int(head_dim),
    };
}

// In plain floats the two halves one after the other; queries apart from keys and values.
void float_qkv(const char* op, const Tensor& x, const cuda::ThinLinear& params) {
    cuda::RotaryStoreKv rotary = params.rotary;
    cuda::ThinLinear queries = params, others = params;
    queries.kind = others.kind = cuda::ThinKind::kPlain;
    queries.out = rotary.q;
    queries.out_dim = rotary.q_stride;
    const int64_t part = int64_t(rotary.kv_heads) * rotary.head_dim;
    const Tensor rest = empty({x.size(0), 2 * part}, x);
    others.out = rest.data_ptr();
    others.out_dim = 2 * part;
    others.weight = static_cast<const float*>(params.weight) + queries.out_dim * params.weight_stride;
    if (params.bias) others.bias = static_cast<const float*>(params.bias) + queries.out_dim;
    rotary.k = others.out;
    rotary.v = static_cast<const float*>(others.out) + part;
    rotary.k_stride = rotary.v_stride = 2 * part;
    launch(op, x, cuda::thin_linears<float>, queries);
    launch(op, x, cuda::thin_linears<float>, others);
    launch(op, x, cuda::rotary_store_kv<float>, rotary);
}

Tensor thin_qkv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& kv,
                const Tensor& positions, const Tensor& slots, const Tensor& cos_sin) {
    const char* op = "thin_qkv";
    check(op, x, weight, bias);
    check_thin(op, x);
    cuda::ThinLinear params = {
        .x = x.data_ptr(),
        .weight = weight.data_ptr(),
        .bias = bias ? bias->data_ptr() : nullptr,
        .rows = int(x.size(0)),
        .dim = x.size(1),
        .out_dim = weight.size(0) / 2,
        .x_stride = x.stride(0),
        .weight_stride = weight.stride(0),
        .kind = cuda::ThinKind::kRotated,
        .rotary = rotation(op, x, weight, kv, positions, slots, cos_sin),
    };
    Tensor q = empty({x.size(0), params.rotary.q_heads, params.rotary.head_dim}, x);
    params.rotary.q = q.data_ptr();
    if (x.scalar_type() == ScalarType::Float) {
        float_qkv(op, x, params);
    } else if (x.scalar_type() == ScalarType::Half) {
        launch(op, x, cuda::thin_linears<__half>, params);
    } else {
        launch(op, x, cuda::thin_linears<__nv_bfloat16>, params);
    }
    return q;
}

void check_tiles(const cuda::TileLinear& p, bool bias) {
    require(!p.gated || p.weight_rows % 2 == 0, "tile_linear: gated, weight must have an even number of rows, got ",
            p.weight_rows);
    require(!p.gated || !bias, "tile_linear: gated, there must be no bias");
    const int c = p.cols;
    if (p.gated) {
        require(c == 80 || c == 144 || c == 160, "tile_linear: gated, cols must be 80, 144 or 160, got ", c);
    } else {
        require(c == 40 || c == 48 || c == 56 || c == 64 || c == 96,
                "tile_linear: cols must be 40, 48, 56, 64 or 96, got ", c);
    }
    require(p.tiles >= 1 && p.tiles <= cuda::kMaxTiles, "tile_linear: tiles must be 1 to ", cuda::kMaxTiles, ", got ",
            p.tiles);
    require(p.split >= 1 && p.split <= cuda::kMaxParts, "tile_linear: split must be 1 to ", cuda::kMaxParts, ", got ",
            p.split);
    require(p.blocks == 1 || p.blocks == 2, "tile_linear: blocks must be 1 or 2, got ", p.blocks);
}

// Whether `on`'s GPU has linear_tile.cuh's kernel.
bool has_tiles(const Tensor& on) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    return cuda::has_tiles();
}

Tensor tile_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool gated, int64_t cols,
                   int64_t tiles, int64_t split, int64_t blocks) {
    const char* op = "tile_linear";
    check(op, x, weight, bias);
    cuda::TileLinear params = {
        .x = x.data_ptr(),
        .weight = weight.data_ptr(),
        .bias = bias ? bias->data_ptr() : nullptr,
        .out = nullptr,
        .rows = int(x.size(0)),
        .dim = x.size(1),
        .weight_rows = weight.size(0),
        .x_stride = x.stride(0),
        .weight_stride = weight.stride(0),
        .gated = gated,
        .cols = int(cols),
        .tiles = int(tiles),
        .split = int(split),
        .blocks = int(blocks),
    };
    check_tiles(params, bias.has_value());
    if (x.scalar_type() == ScalarType::Float || !cuda::tiles_fit(params) || !has_tiles(x)) {
        return gated ? gated_by_thin_rows(op, x, weight) : by_thin_rows(op, x, weight, bias, false);
    }
    Tensor out = empty({x.size(0), gated ? weight.size(0) / 2 : weight.size(0)}, x);
    params.out = out.data_ptr();
    const bool half = x.scalar_type() == ScalarType::Half;
    launch(op, x, half ? cuda::tile_linear<__half> : cuda::tile_linear<__nv_bfloat16>, params);
    return out;
}

void check_gated(const cuda::GatedLinear& p) {
    const char* op = "tall_gated_linear";
    const int c = p.cols;
    require(c == 128 || c == 160 || c == 192 || c == 224 || c == 256, op,
            ": cols must be 128, 160, 192, 224 or 256, got ", c);
    const bool alone = p.down == 1 && p.across == 1, pair = p.down > 0 && p.across > 0 && p.down + p.across == 3;
    require(alone || pair, op, ": down and across must be 1, 1 or 2, 1 or 1, 2, got ", p.down, ", ", p.across);
    require(p.band >= 1, op, ": band must be positive, got ", p.band);
}

Tensor tall_gated_linear(const Tensor& x, const Tensor& weight, int64_t cols, int64_t down, int64_t across,
                         int64_t band) {
    const char* op = "tall_gated_linear";
    check(op, x, weight, std::nullopt);
    check_gates(op, weight);
    cuda::GatedLinear params = {
        .x = x.data_ptr(),
        .weight = weight.data_ptr(),
        .out = nullptr,
        .rows = int(x.size(0)),
        .dim = x.size(1),
        .out_dim = weight.size(0) / 2,
        .x_stride = x.stride(0),
        .weight_stride = weight.stride(0),
        .cols = int(cols),
        .down = int(down),
        .across = int(across),
        .band = int(band),
    };
    check_gated(params);
    if (x.scalar_type() == ScalarType::Float || !cuda::gated_fits(params) || !has_tiles(x)) {
        return gated_by_thin_rows(op, x, weight);
    }
    Tensor out = empty({x.size(0), params.out_dim}, x);
    params.out = out.data_ptr();
    const bool half = x.scalar_type() == ScalarType::Half;
    launch(op, x, half ? cuda::gated_linear<__half> : cuda::gated_linear<__nv_bfloat16>, params);
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CUDA, m) {
    m.impl("thin_linear", TORCH_BOX(&thin_linear));
    m.impl("thin_gated_linear", TORCH_BOX(&thin_gated_linear));
    m.impl("thin_qkv", TORCH_BOX(&thin_qkv));
    m.impl("tile_linear", TORCH_BOX(&tile_linear));
    m.impl("tall_gated_linear", TORCH_BOX(&tall_gated_linear));
    m.impl("has_tiles", TORCH_BOX(&has_tiles));
}

}  // namespace nanoinfer
