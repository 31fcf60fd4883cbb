// All CPU kernels for one instruction set. setup.py compiles this file several times, each time with another
// NANOINFER_ISA and the compiler flags of that instruction set; kernels.cpp picks a table when the library is loaded.
//
// What is compiled here may run only on machines that have the instruction set, so nothing here may be shared with
// other files: an inline function of the standard library, compiled here with AVX-512, could be the copy that the
// linker keeps for everybody. Hence kernels use C headers alone, and all that they define is static or in the namespace
// NANOINFER_ISA.

#include "activation.h"
#include "attention.h"
#include "kernels.h"
#include "linear.h"
#include "norm.h"
#include "rotary.h"
#include "sampler.h"

// A table's entry: the kernel for the dtype that the parameters name.
#define FOR_EACH_DTYPE(kernel, Params)                \
    [](const Params& p, int64_t begin, int64_t end) { \
        switch (p.dtype) {                            \
            case Dtype::f32:                          \
                return kernel<float>(p, begin, end);  \
            case Dtype::bf16:                         \
                return kernel<bf16>(p, begin, end);   \
            case Dtype::f16:                          \
                return kernel<f16>(p, begin, end);    \
        }                                             \
    }

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

namespace nanoinfer::NANOINFER_ISA {

extern const Kernels table;
const Kernels table = {
    .isa = TEXT(NANOINFER_ISA),
    .merge_splits = FOR_EACH_DTYPE(merge_splits, PagedAttention),
    .paged_attention = FOR_EACH_DTYPE(paged_attention, PagedAttention),
    .rms_norm = FOR_EACH_DTYPE(rms_norm, RmsNorm),
    .rotary_store_kv = FOR_EACH_DTYPE(rotary_store_kv, RotaryStoreKv),
    .sample = sample,
    .silu_and_mul = FOR_EACH_DTYPE(silu_and_mul, SiluAndMul),
    .widen_input = FOR_EACH_DTYPE(widen_input, ThinLinear),
    .thin_linear = FOR_EACH_DTYPE(thin_linear, ThinLinear),
};

}  // namespace nanoinfer::NANOINFER_ISA
