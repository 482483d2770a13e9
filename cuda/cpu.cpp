// Which of the instruction sets that this library was compiled for the processor has.

// What the names of the functions to call end in.
extern "C" const char* visualrwkv_cpu_variant() {
#if defined(VARIANTS) && defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return "_baseline";
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512vnni")) return "_avx512vnni";
    return avx512 ? "_avx512" : "_avx2";
#else
    return "";
#endif
}
