// WKV-7 on the GPU: per head, with a state S (value x key) and w = exp(-exp(raw w)),
//
//     sa_t = S_{t-1} a_t        S_t = S_{t-1} diag(w_t) + sa_t b_t^T + v_t k_t^T        y_t = S_t r_t
//
// Two ways: "plain" walks step by step with a row or a column of the state in each thread's registers (any GPU, head
// sizes to 128); "tiled" joins 16 steps by products on tensor cores (sm_80 and later, head size 64).
//
// Layout: r, w, k, v, a, b, y (rows, H, N) with the sequences one after another in the rows; states (S, H, N, N). The
// state at the start of every CHUNK steps is kept for the gradients: (Sequences::first_slot + chunk, H, N, N).
#include <type_traits>

#include "wkv7_backward.cuh"
#include "wkv7_forward.cuh"
#include "wkv7_plain.cuh"

namespace {

template <typename T, int N>
cudaError_t plain_forward_launch(const Sequences& seqs, int64_t heads, const Inputs<T>& in, const float* state, T* y,
                                 float* final_state, float* states, cudaStream_t stream) {
    return gpu::launch(plain_forward<T, N>, dim3(seqs.count * heads), dim3(N), 5 * N * sizeof(float), stream, seqs,
                       heads, in, state, y, final_state, states);
}

template <typename T, int N>
cudaError_t plain_backward_launch(const Sequences& seqs, int64_t heads, const Inputs<T>& in, const float* states,
                                  const T* dy, const float* dfinal, const Gradients& grad, cudaStream_t stream) {
    return gpu::launch(plain_backward<T, N>, dim3(seqs.count * heads), dim3(N), (5 + 3 * CHUNK) * N * sizeof(float),
                       stream, seqs, heads, in, states, dy, dfinal, grad);
}

// Call `of` with the head size as a compile-time number.
template <typename Function>
cudaError_t with_head_size(int64_t head_size, Function of) {
    switch (head_size) {
        case 16: return of(std::integral_constant<int, 16>());
        case 32: return of(std::integral_constant<int, 32>());
        case 48: return of(std::integral_constant<int, 48>());
        case 64: return of(std::integral_constant<int, 64>());
        case 80: return of(std::integral_constant<int, 80>());
        case 96: return of(std::integral_constant<int, 96>());
        case 112: return of(std::integral_constant<int, 112>());
        case 128: return of(std::integral_constant<int, 128>());
        default: return static_cast<cudaError_t>(1);  // cudaErrorInvalidValue
    }
}

bool plain_only = false;

// Whether the device has tensor cores for bf16, and this much shared memory for a block.
bool can_tile(size_t shared_bytes) {
#ifdef CUDA_EMULATED
    (void)shared_bytes;
    return true;
#else
    int device = 0, major = 0, most = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return major >= 8 && shared_bytes <= static_cast<size_t>(most);
#endif
}

// Call `of` with the values of a split as a compile-time number; false where there is no tiled kernel for these sizes.
template <typename Function>
bool with_values(int64_t head_size, int64_t splits, Function of) {
    if (plain_only || head_size != SIZE) return false;
    switch (splits) {
        case 1: return of(std::integral_constant<int, SIZE>());
        case 2: return of(std::integral_constant<int, SIZE / 2>());
        case 4: return of(std::integral_constant<int, SIZE / 4>());
        default: return false;
    }
}

template <typename T>
cudaError_t forward(int64_t splits, const Sequences& seqs, int64_t heads, int64_t head_size, const Inputs<T>& in,
                    const float* state, T* y, float* final_state, float* states, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    const bool tiled = with_values(head_size, splits, [&](auto values) {
        constexpr int VALUES = values(), BYTES = FORWARD_BYTES<sizeof(T) == 4, VALUES>;
        if (!can_tile(BYTES)) return false;
        error = gpu::launch(tiled_forward<T, VALUES>, dim3(seqs.count * heads, SIZE / VALUES),
                            dim3(HELPERS * WARP + VALUES * 2), BYTES, stream, seqs, heads, in,
                            state, y, final_state, states);
        return true;
    });
    if (tiled) return error;
    return with_head_size(head_size, [&](auto n) {
        return plain_forward_launch<T, n()>(seqs, heads, in, state, y, final_state, states, stream);
    });
}

template <typename T>
cudaError_t backward(const Sequences& seqs, int64_t heads, int64_t head_size, const Inputs<T>& in, const float* states,
                     const T* dy, const float* dfinal, const Gradients& grad, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    const bool tiled = with_values(head_size, grad.splits, [&](auto values) {
        constexpr int VALUES = values(), BYTES = Backward<sizeof(T) == 4, VALUES>::BYTES;
        if (!can_tile(BYTES)) return false;
        error = gpu::launch(tiled_backward<T, VALUES>, dim3(seqs.count * heads, SIZE / VALUES),
                            dim3(HELPERS * WARP + VALUES * 2), BYTES, stream, seqs, heads, in,
                            states, dy, dfinal, grad);
        return true;
    });
    if (tiled) return error;
    return with_head_size(head_size, [&](auto n) {
        return plain_backward_launch<T, n()>(seqs, heads, in, states, dy, dfinal, grad, stream);
    });
}

template <typename T>
Inputs<T> inputs(const void* r, const void* w, const void* k, const void* v, const void* a, const void* b) {
    const auto as = [](const void* x) { return static_cast<const T*>(x); };
    return {as(r), as(w), as(k), as(v), as(a), as(b)};
}

}  // namespace

// Run the plain kernels only, or no longer; for tests.
extern "C" void visualrwkv_cuda_wkv7_plain(int64_t on) { plain_only = on != 0; }

extern "C" int visualrwkv_cuda_wkv7_forward(int64_t dtype, int64_t splits, int64_t sequences, int64_t length,
                                            const int64_t* offsets, int64_t heads, int64_t head_size, const void* r,
                                            const void* w, const void* k, const void* v, const void* a, const void* b,
                                            const float* state, void* y, float* final_state, float* states,
                                            cudaStream_t stream) {
    const Sequences seqs{sequences, length, offsets};
    if (dtype == gpu::FLOAT32) {
        return forward<float>(splits, seqs, heads, head_size, inputs<float>(r, w, k, v, a, b), state,
                              static_cast<float*>(y), final_state, states, stream);
    }
    return forward<bf16>(splits, seqs, heads, head_size, inputs<bf16>(r, w, k, v, a, b), state, static_cast<bf16*>(y),
                         final_state, states, stream);
}

extern "C" int visualrwkv_cuda_wkv7_backward(int64_t dtype, int64_t splits, int64_t sequences, int64_t length,
                                             const int64_t* offsets, int64_t heads, int64_t head_size, const void* r,
                                             const void* w, const void* k, const void* v, const void* a, const void* b,
                                             const float* states, const void* dy, const float* dfinal_state, void* dr,
                                             void* dw, void* dk, void* dv, void* da, void* db, float* dstate,
                                             cudaStream_t stream) {
    const Sequences seqs{sequences, length, offsets};
    const Gradients grad{dr, dw, dk, dv, da, db, dstate, static_cast<int>(splits)};
    if (dtype == gpu::FLOAT32) {
        return backward<float>(seqs, heads, head_size, inputs<float>(r, w, k, v, a, b), states,
                               static_cast<const float*>(dy), dfinal_state, grad, stream);
    }
    return backward<bf16>(seqs, heads, head_size, inputs<bf16>(r, w, k, v, a, b), states,
                          static_cast<const bf16*>(dy), dfinal_state, grad, stream);
}
