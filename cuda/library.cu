// What the library says of itself.
#include "gpu.cuh"

#ifndef ARCHITECTURES
#define ARCHITECTURES "emulated"
#endif

// The GPUs that the library holds code for.
extern "C" const char* visualrwkv_cuda_architectures() { return ARCHITECTURES; }

extern "C" const char* visualrwkv_cuda_error(int status) {
#ifdef CUDA_EMULATED
    return status == 1 ? "invalid argument" : "invalid configuration";
#else
    return cudaGetErrorString(static_cast<cudaError_t>(status));
#endif
}
