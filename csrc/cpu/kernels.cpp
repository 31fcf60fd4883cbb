#include "kernels.h"

#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <stdexcept>
#include <string>

namespace nanoinfer {

#if defined(__x86_64__)
#define NANOINFER_X86 1
#endif

namespace plain {
extern const Kernels table;
}
#ifdef NANOINFER_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_amx {
extern const Kernels table;
}
#endif

#ifdef NANOINFER_X86
// AMX registers are 8 KiB that Linux saves for a process only once it has asked; all its threads then have them.
static bool kernel_grants_amx() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// What a machine must have is what setup.py lets the compiler use for that table.
int supported_kernels(const Kernels* tables[kMaxTables]) {
    int count = 0;
    tables[count++] = &plain::table;
#ifdef NANOINFER_X86
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool has_amx = has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
                         __builtin_cpu_supports("amx-bf16") && kernel_grants_amx();
    if (has_avx2) tables[count++] = &avx2::table;
    if (has_avx512) tables[count++] = &avx512::table;
    if (has_amx) tables[count++] = &avx512_amx::table;
#endif
    return count;
}

namespace {

const Kernels& choose() {
    const Kernels* tables[kMaxTables];
    const int count = supported_kernels(tables);
    const char* wanted = getenv("NANOINFER_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return *tables[count - 1];
    std::string names;
    for (int i = 0; i < count; ++i) {
        if (std::string(wanted) == tables[i]->isa) return *tables[i];
        names += std::string(i ? ", " : "") + tables[i]->isa;
    }
    throw std::runtime_error("NANOINFER_CPU_ISA is '" + std::string(wanted) + "', but this machine supports: " + names);
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace nanoinfer
