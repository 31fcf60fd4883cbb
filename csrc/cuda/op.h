#pragma once
// What every CUDA op's file needs: checks, outputs, dtypes as types, a launch on torch's stream.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../check.h"

// Torch has this function in its CUDA builds alone. Weak, so that the library loads without one and serves the CPU.
#pragma weak aoti_torch_get_current_cuda_stream

namespace nanoinfer {

// A contiguous tensor of uninitialised memory on the device of `like`, of its dtype where none is named.
inline Tensor empty(std::initializer_list<int64_t> sizes, const Tensor& like,
                    std::optional<ScalarType> dtype = std::nullopt) {
    return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
}

inline int32_t* ints(const Tensor& t) { return static_cast<int32_t*>(t.data_ptr()); }

// call(a number of the C++ type of t's dtype); the op has checked that this is one of the three.
template <typename Call>
void with_type(const Tensor& t, Call call) {
    switch (t.scalar_type()) {
        case ScalarType::Float:
            return call(float());
        case ScalarType::BFloat16:
            return call(__nv_bfloat16());
        default:
            return call(__half());
    }
}

// Launches on torch's current stream of the device of `on`, and raises what CUDA says of it. Nothing waits, so an op
// can be captured in a graph.
template <typename Params>
void launch(const char* op, const Tensor& on, cudaError_t (*launcher)(const Params&, cudaStream_t),
            const Params& params) {
    const auto device = on.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const cudaError_t error = launcher(params, static_cast<cudaStream_t>(stream));
    require(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

}  // namespace nanoinfer
