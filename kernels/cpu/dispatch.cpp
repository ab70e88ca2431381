#include "dispatch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef HF_GPTQ_X86_64
#include <cpuid.h>
#endif
#if defined(HF_GPTQ_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hf_gptq {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
  Linear linear_int8;
};

#ifdef HF_GPTQ_X86_64
// __builtin_cpu_supports also asks whether the operating system saves the registers. F16C, which
// not every compiler knows by name there, uses the same registers as AVX2.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

#ifdef HF_GPTQ_AMX
// Whether the processor multiplies tiles of bf16 and the operating system lets this process: Linux
// saves the 8 KB of tiles only for processes that ask.
bool has_amx() {
#if defined(HF_GPTQ_EMULATE_AVX512)
  return true;
#elif defined(__linux__)
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & (kBf16 | kTiles)) != (kBf16 | kTiles)) return false;
  __asm__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  constexpr unsigned kSaved = 3u << 17;  // the configuration of tiles, and tiles
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return (eax & kSaved) == kSaved && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Kernels with_tiles(Kernels kernels) {
  kernels.isa = "amx";
  kernels.linear = linear_amx;
  kernels.transposed = transposed_amx;
  return kernels;
}
#endif

Dispatch choose() {
  const char* wanted = getenv("HF_GPTQ_ISA");
  if (!wanted) wanted = "";
#ifdef HF_GPTQ_X86_64
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#ifdef HF_GPTQ_EMULATE_AVX512
  const bool avx512f = avx2, avx512bf16 = avx2, vnni = avx2;
#else
  const bool avx512f = avx2 && __builtin_cpu_supports("avx512f");
  const bool avx512bf16 =
      avx512f && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
  const bool vnni =
      avx512f && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni");
#endif
  const Linear int8 = vnni ? linear_int8_avx512vnni : nullptr;
#ifdef HF_GPTQ_AMX
  static const Kernels amx = with_tiles(kernels_avx512bf16);
#endif
  const Candidate candidates[] = {
#ifdef HF_GPTQ_AMX
      // By name only: it has been computed, but has not run on a processor yet.
      {&amx, strcmp(wanted, "amx") == 0 && avx512bf16 && has_amx(), int8},
#endif
      {&kernels_avx512bf16, avx512bf16, int8},
      {&kernels_avx512f, avx512f, int8},
      {&kernels_avx2, avx2, nullptr},
      {&kernels_portable, true, nullptr}};
#else
  const Candidate candidates[] = {{&kernels_portable, true, nullptr}};
#endif

  const Candidate* best = nullptr;
  for (const Candidate& candidate : candidates) {
    if (candidate.supported && !best) best = &candidate;
  }
  if (!*wanted) return {best->kernels, best->linear_int8, nullptr};

  const char* reason = "is not an instruction set of this build";
  for (const Candidate& candidate : candidates) {
    if (strcmp(wanted, candidate.kernels->isa) != 0) continue;
    if (candidate.supported) return {candidate.kernels, candidate.linear_int8, nullptr};
    reason = "is not supported by this CPU";
  }
  static char message[160];
  snprintf(message, sizeof message, "HF_GPTQ_ISA=%.40s %s; using %s (accepted:", wanted, reason,
           best->kernels->isa);
  for (const Candidate& candidate : candidates) {
    if (!candidate.supported) continue;
    const size_t used = strlen(message);
    snprintf(message + used, sizeof message - used, " %s", candidate.kernels->isa);
  }
  const size_t used = strlen(message);
  snprintf(message + used, sizeof message - used, ")");
  return {best->kernels, best->linear_int8, message};
}

}  // namespace

const Dispatch& dispatch() {
  static const Dispatch chosen = choose();
  return chosen;
}

}  // namespace hf_gptq
