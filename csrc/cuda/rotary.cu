#include "op.h"
#include "rotary.cuh"

namespace nanoinfer {
namespace {

// Each of the two takes a part of what the kernel does; its checks fill that part of the parameters.
struct Angles {
    const Tensor &positions, &cos_sin;
    bool interleaved;
};

void add_rotation(const char* op, const char* name, cuda::RotaryStoreKv& p, const Tensor& x, const Angles& angles) {
    const int64_t head_dim = x.size(2), rotary_dim = angles.cos_sin.dim() == 2 ? angles.cos_sin.size(1) : 0;
    Want(op, "positions", angles.positions).dtype(ScalarType::Int).shape({x.size(0)}).dense(0).same_device(x);
    Want(op, "cos_sin", angles.cos_sin).dtype(ScalarType::Float).shape({-1, -1}).dense(0).same_device(x);
    require(rotary_dim % 2 == 0 && rotary_dim <= head_dim, op,
            ": cos_sin must have an even number of columns up to the ", head_dim, " numbers of a head of ", name,
            ", got ", rotary_dim);
    p.positions = ints(angles.positions);
    p.cos_sin = static_cast<const float*>(angles.cos_sin.data_ptr());
    p.num_positions = angles.cos_sin.size(0);
    p.rotary_dim = int(rotary_dim);
    p.interleaved = angles.interleaved;
}

void add_rotated(const char* op, const char* name, cuda::RotaryStoreKv& p, const Tensor& x) {
    Want(op, name, x).floating().shape({-1, -1, -1}).dense(1);
    p.q = x.data_ptr();
    p.tokens = x.size(0);
    p.q_heads = int(x.size(1));
    p.head_dim = int(x.size(2));
    p.q_stride = x.stride(0);
}

void add_store(const char* op, cuda::RotaryStoreKv& p, const Tensor& k, const Tensor& v, const Tensor& kv,
               const Tensor& slots) {
    Want(op, "k", k).floating().shape({-1, -1, -1}).dense(1);
    const int64_t tokens = k.size(0), heads = k.size(1), head_dim = k.size(2);
    Want(op, "v", v).dtype(k.scalar_type()).shape({tokens, heads, head_dim}).dense(1).same_device(k);
    Want(op, "kv", kv).dtype(k.scalar_type()).shape({-1, 2, heads, -1, head_dim}).dense(0).same_device(k);
    Want(op, "slots", slots).dtype(ScalarType::Int).shape({tokens}).dense(0).same_device(k);
    p.k = k.data_ptr();
    p.v = v.data_ptr();
    p.kv = kv.data_ptr();
    p.tokens = tokens;
    p.kv_heads = int(heads);
    p.head_dim = int(head_dim);
    p.block_size = int(kv.size(3));
    p.k_stride = k.stride(0);
    p.v_stride = v.stride(0);
    p.num_slots = kv.size(0) * kv.size(3);
    p.slots = ints(slots);
}

void run(const char* op, const Tensor& x, const cuda::RotaryStoreKv& p) {
    with_type(x, [&](auto number) { launch(op, x, cuda::rotary_store_kv<decltype(number)>, p); });
}

void rotary(const Tensor& x, const Tensor& positions, const Tensor& cos_sin, bool interleaved) {
    cuda::RotaryStoreKv params = {};
    add_rotated("rotary", "x", params, x);
    add_rotation("rotary", "x", params, x, {positions, cos_sin, interleaved});
    run("rotary", x, params);
}

void store_kv(const Tensor& k, const Tensor& v, const Tensor& kv, const Tensor& slots) {
    cuda::RotaryStoreKv params = {};
    add_store("store_kv", params, k, v, kv, slots);
    run("store_kv", k, params);
}

void rotary_store_kv(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv, const Tensor& positions,
                     const Tensor& slots, const Tensor& cos_sin, bool interleaved) {
    const char* op = "rotary_store_kv";
    cuda::RotaryStoreKv params = {};
    add_rotated(op, "q", params, q);
    Want(op, "k", k).dtype(q.scalar_type()).shape({q.size(0), -1, q.size(2)}).same_device(q);
    add_store(op, params, k, v, kv, slots);
    add_rotation(op, "q", params, q, {positions, cos_sin, interleaved});
    run(op, q, params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nanoinfer, CUDA, m) {
    m.impl("rotary", TORCH_BOX(&rotary));
    m.impl("store_kv", TORCH_BOX(&store_kv));
    m.impl("rotary_store_kv", TORCH_BOX(&rotary_store_kv));
}

}  // namespace nanoinfer
