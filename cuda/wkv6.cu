// WKV-6 on a GPU. Per sequence and head, with a state S of N keys by N values and the decay w = exp(-exp(raw w)):
//
//     y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)        S_t = diag(w_t) S_{t-1} + k_t v_t^T
//
// Two ways. The fast one walks in tiles of 16 steps whose work is products of 16 x 16 blocks on tensor cores; a block
// of threads (CTA) takes one head of one sequence, or some of its value columns ("split"). The plain one, for other
// head sizes and older GPUs, walks step by step.
//
// In a tile let c_t be the sum of log decays of steps 0..t, and m = c_7 the sum to its middle. Step t reads what step
// s < t wrote through the decay exp(c_{t-1} - c_s), which has to be a product of a factor of t and a factor of s:
//
//     r_mid_t = r_t exp(c_{t-1} - m)      k_mid_s = k_s exp(m - c_s)       between steps of the tile
//     r_in_t = r_t exp(c_{t-1})           k_out_s = k_s exp(c_15 - c_s)    from the state before, into the one after
//
// The first pair may grow, by at most 8 steps' decay; a log decay is taken as at least -10 (the decay is then off by
// 5e-5 at most), so by exp(80) at most, which fp32 and bf16 hold: with decays that strong, for |r|, |k| to 6000. The
// products with s > t may overflow and are replaced, not multiplied, by zero.
//
// Inputs in bf16 stay bf16, sums are fp32. Inputs in fp32 become pairs of bf16, high and low part, and three products.
//
// Layout: r, k, v, w, y (rows, H, N) with the sequences one after another in the rows; u (H, N); states (S, H, N, N).
#include "wkv6_backward.cuh"
#include "wkv6_forward.cuh"
#include "wkv6_plain.cuh"

namespace {

bool plain_only = false;

static_assert(sizeof(typename Forward<bf16, 64, 64>::Shared) <= 72 * 1024 &&
                  sizeof(typename Backward<bf16, 64, 64>::Shared) <= 113 * 1024,
              "three blocks forward, two backward, share the 228 KB of a Hopper multiprocessor");

// Whether the GPU has tensor cores for bf16 and room for this much shared memory.
bool takes_tiles(size_t shared_bytes) {
#ifdef CUDA_EMULATED
    (void)shared_bytes;
    return !plain_only;
#else
    int device = 0, major = 0, room = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return !plain_only && major >= 8 && shared_bytes <= static_cast<size_t>(room);
#endif
}

bool fits(int64_t splits, int64_t sequences, int64_t heads, int64_t head_size) {
    return splits >= 1 && sequences >= 1 && heads >= 1 && head_size >= 16 && head_size <= 256 && head_size % 16 == 0;
}

template <int X>
using Int = std::integral_constant<int, X>;

// run(N, VALUES) with the head size and the value columns of a split as types; false where there are no such kernels.
template <typename Run>
bool with_tiles(int64_t head_size, int64_t splits, Run run) {
    if (head_size == 64 && splits == 1) return run(Int<64>(), Int<64>());
    if (head_size == 64 && splits == 2) return run(Int<64>(), Int<32>());
    if (head_size == 64 && splits == 4) return run(Int<64>(), Int<16>());
    if (head_size == 32 && splits == 1) return run(Int<32>(), Int<32>());
    if (head_size == 32 && splits == 2) return run(Int<32>(), Int<16>());
    return false;
}

template <typename T>
cudaError_t run_forward(const gpu::Sequences& seqs, int64_t splits, int64_t heads, int64_t head_size,
                        const Inputs<T>& in, const float* state, T* y, float* final_state, float* states,
                        cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    const unsigned items = static_cast<unsigned>(seqs.count * heads);
    const bool done = with_tiles(head_size, splits, [&](auto n, auto values) {
        typedef Forward<T, n, values> F;
        const size_t bytes = sizeof(typename F::Shared);
        if (!takes_tiles(bytes)) return false;
        error = gpu::launch(forward_tiles<T, n, values>, dim3(items * F::SPLITS), dim3(F::THREADS), bytes, stream, seqs,
                            heads, in, state, y, final_state, states);
        return true;
    });
    if (done) return error;
    const Scan<T> scan{in.r, in.k, in.v, in.w, in.u, state, y, final_state, states};
    return gpu::launch(scan_steps<T, false>, dim3(items * static_cast<unsigned>(head_size / LINES)),
                       dim3(PLAIN_THREADS), scan_bytes(head_size), stream, seqs, heads, head_size, scan);
}

template <typename T, typename Out>
cudaError_t run_backward(const gpu::Sequences& seqs, int64_t splits, int64_t heads, int64_t head_size,
                         const Inputs<T>& in, const float* states, const Gradients<T, Out>& grad, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    const unsigned items = static_cast<unsigned>(seqs.count * heads);
    const bool done = with_tiles(head_size, splits, [&](auto n, auto values) {
        typedef Backward<T, n, values> B;
        if constexpr (!std::is_same_v<Out, typename B::Out>) {
            return false;
        } else {
            const size_t bytes = sizeof(typename B::Shared);
            if (!takes_tiles(bytes)) return false;
            error = gpu::launch(backward_tiles<T, n, values>, dim3(items * B::SPLITS), dim3(B::THREADS), bytes, stream,
                                seqs, heads, in, states, grad);
            return true;
        }
    });
    if (done) return error;
    const dim3 grid(items * static_cast<unsigned>(head_size / LINES));
    error = gpu::launch(backward_keys<T, Out>, grid, dim3(PLAIN_THREADS), keys_bytes(head_size), stream, seqs, heads,
                        head_size, splits, in, states, grad);
    if (error != cudaSuccess) return error;
    const Scan<T> scan{in.k, in.r, grad.dy, in.w, in.u, grad.dfinal, grad.dv, grad.dstate, nullptr};
    return gpu::launch(scan_steps<T, true>, grid, dim3(PLAIN_THREADS), scan_bytes(head_size), stream, seqs, heads,
                       head_size, scan);
}

template <typename T>
Inputs<T> inputs(const void* r, const void* k, const void* v, const void* w, const float* u) {
    return {static_cast<const T*>(r), static_cast<const T*>(k), static_cast<const T*>(v), static_cast<const T*>(w), u};
}

template <typename T, typename Out>
Gradients<T, Out> gradients(const void* dy, const float* dfinal, void* dr, void* dk, void* dv, void* dw, float* du,
                            float* dstate) {
    return {static_cast<const T*>(dy),
            dfinal,
            static_cast<Out*>(dr),
            static_cast<Out*>(dk),
            static_cast<T*>(dv),
            static_cast<Out*>(dw),
            du,
            dstate};
}

constexpr int INVALID_VALUE = 1;

}  // namespace

// The device walks step by step from now on, or not: for tests.
extern "C" int visualrwkv_cuda_wkv6_plain(int64_t on) {
    plain_only = on != 0;
    return 0;
}

// offsets: (sequences + 1) row numbers on the device, of which `length` are the rows of all, or null when every
// sequence has `length` rows; wrong ones are cut to the rows. dtype: of r, k, v, w, y, all aligned to 16 bytes.
// head_size: a multiple of 16 up to 256. splits: CTAs that share a head, 1, 2 or 4. state: null for zeros. states:
// null, or one state (heads, head_size, head_size) in each of rows / 64 + sequences slots, for the backward pass.
extern "C" int visualrwkv_cuda_wkv6_forward(int64_t dtype, int64_t splits, int64_t sequences, int64_t length,
                                            const int64_t* offsets, int64_t heads, int64_t head_size, const void* r,
                                            const void* k, const void* v, const void* w, const float* u,
                                            const float* state, void* y, float* final_state, float* states,
                                            cudaStream_t stream) {
    if (!fits(splits, sequences, heads, head_size)) return INVALID_VALUE;
    const gpu::Sequences seqs{sequences, length, offsets};
    if (dtype == gpu::BFLOAT16)
        return run_forward<bf16>(seqs, splits, heads, head_size, inputs<bf16>(r, k, v, w, u), state,
                                 static_cast<bf16*>(y), final_state, states, stream);
    if (dtype == gpu::FLOAT32)
        return run_forward<float>(seqs, splits, heads, head_size, inputs<float>(r, k, v, w, u), state,
                                  static_cast<float*>(y), final_state, states, stream);
    return INVALID_VALUE;
}

// dfinal: null for zeros. dr, dk, dw: with one split like r; with more (splits, rows, H, N) fp32, whose sum is the
// gradient. du: (splits, sequences, H, N) fp32, likewise.
extern "C" int visualrwkv_cuda_wkv6_backward(int64_t dtype, int64_t splits, int64_t sequences, int64_t length,
                                             const int64_t* offsets, int64_t heads, int64_t head_size, const void* r,
                                             const void* k, const void* v, const void* w, const float* u,
                                             const float* states, const void* dy, const float* dfinal, void* dr,
                                             void* dk, void* dv, void* dw, float* du, float* dstate,
                                             cudaStream_t stream) {
    if (!fits(splits, sequences, heads, head_size)) return INVALID_VALUE;
    const gpu::Sequences seqs{sequences, length, offsets};
    if (dtype == gpu::FLOAT32)
        return run_backward(seqs, splits, heads, head_size, inputs<float>(r, k, v, w, u), states,
                            gradients<float, float>(dy, dfinal, dr, dk, dv, dw, du, dstate), stream);
    if (dtype != gpu::BFLOAT16) return INVALID_VALUE;
    if (splits == 1)
        return run_backward(seqs, splits, heads, head_size, inputs<bf16>(r, k, v, w, u), states,
                            gradients<bf16, bf16>(dy, dfinal, dr, dk, dv, dw, du, dstate), stream);
    return run_backward(seqs, splits, heads, head_size, inputs<bf16>(r, k, v, w, u), states,
                        gradients<bf16, float>(dy, dfinal, dr, dk, dv, dw, du, dstate), stream);
}
