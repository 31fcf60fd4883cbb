#pragma once
// The CPU kernels as a table of functions. isa.cpp fills one table for each instruction set it is compiled for.

#include <stdint.h>

namespace nanoinfer {

enum class Dtype { f32, bf16, f16 };

// What an op hands to its kernel; each is defined beside the kernel, in NAME.h.
struct PagedAttention;
struct RmsNorm;
struct RotaryStoreKv;
struct Sample;
struct SiluAndMul;
struct ThinLinear;

// Each kernel works on rows [begin, end) of what its first argument describes. Rows are independent, so that threads
// split them in any way and results do not depend on the number of threads.
struct Kernels {
    const char* isa;
    void (*merge_splits)(const PagedAttention&, int64_t begin, int64_t end);
    void (*paged_attention)(const PagedAttention&, int64_t begin, int64_t end);
    void (*rms_norm)(const RmsNorm&, int64_t begin, int64_t end);
    void (*rotary_store_kv)(const RotaryStoreKv&, int64_t begin, int64_t end);
    void (*sample)(const Sample&, int64_t begin, int64_t end);
    void (*silu_and_mul)(const SiluAndMul&, int64_t begin, int64_t end);
    void (*widen_input)(const ThinLinear&, int64_t begin, int64_t end);
    void (*thin_linear)(const ThinLinear&, int64_t begin, int64_t end);
};

// The best table for this machine, or the one that the environment variable NANOINFER_CPU_ISA names.
// Throws std::runtime_error where that is unknown or not supported here.
const Kernels& kernels();

// All tables that this machine can run, worst first; returns how many.
constexpr int kMaxTables = 4;
int supported_kernels(const Kernels* tables[kMaxTables]);

}  // namespace nanoinfer
