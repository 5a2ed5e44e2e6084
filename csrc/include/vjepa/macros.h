// Function qualifiers that let one body compile for the host and for a CUDA device.
#pragma once

#if defined(__CUDACC__)
#define VJEPA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VJEPA_HOST_DEVICE inline __attribute__((always_inline))
#endif

// One clone of a host function per instruction set, chosen when the library is loaded: a wheel runs on every x86-64 and
// is fast on a recent one. It needs ifunc support, that is GCC or Clang on glibc.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__CUDACC__) && defined(__GNUC__)
#define VJEPA_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#define VJEPA_INSTRUCTION_SETS "avx512f avx2 default"
#else
#define VJEPA_MULTIVERSION
#define VJEPA_INSTRUCTION_SETS "default"
#endif

// The same by levels of the architecture: with 16-bit integers in the widest registers, and with fused multiply-add for
// files that are compiled to use it.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__CUDACC__) && !defined(__clang__) && __GNUC__ >= 12
#define VJEPA_MULTIVERSION_LEVELS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VJEPA_MULTIVERSION_LEVELS VJEPA_MULTIVERSION
#endif
