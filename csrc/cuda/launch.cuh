#pragma once
// Launches that overlap (programmatic dependent launch, from compute capability 9.0 on).
//
// A decode step is a chain of some 200 kernels of 1 to 10 us, and between two of them the GPU idles while the one's
// last blocks end and the other's first ones start. Hence each kernel of ours may be on its SMs already while the one
// before it in the stream still runs: when that was new the eight ops of a Qwen2 layer besides attention took 0.5B's
// row 20.3 us in place of 23.2 on an H200, 1.5B's 37.4 in place of 42.0, 7B's 131 in place of 135. Two rules keep it
// right, whoever wrote the kernel before:
//   - A kernel reads and writes nothing until wait_for_earlier_kernels() has returned; before that it may work out
//     addresses. Weights and biases alone it may read before, if its op says that no kernel of ours may have written
//     them since the last of torch's kernels, which start when all before them have ended.
//     One op may read more, if its caller says that this was written long before: see tables_ready of paged_attention.
//     The kernel that op launches second reads lengths early, too: the first lets it start when all before have ended.
//   - Every thread of every block calls it: a kernel that ended without would let the next one go on too early.

#include <cuda_runtime.h>

namespace nanoinfer::cuda {

// First statement of every kernel: the next one in the stream may take SMs as soon as all blocks of this one have
// theirs.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Returns once all earlier kernels of the stream have ended, and what they wrote is seen.
__device__ inline void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// What the kernel was compiled from has the two instructions. A newer GPU may run what the driver made of older code,
// so its own capability says nothing.
template <typename Params>
bool may_overlap(void (*kernel)(Params)) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

// Launches a kernel that keeps the rules above; `shared`: bytes of dynamic shared memory; `cluster`: so many blocks
// that follow each other reach each other's shared memory (more than one only where the kernel may overlap).
template <typename Params>
cudaError_t launch_kernel(void (*kernel)(Params), dim3 grid, int threads, size_t shared, cudaStream_t stream,
                          const Params& params, int cluster = 1) {
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {unsigned(cluster), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = may_overlap(kernel) ? (cluster > 1 ? 2 : 1) : 0;
    return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace nanoinfer::cuda
