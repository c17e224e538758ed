// Makes the TensorMap of a matrix, on the host: in a launcher, before the launch.
#pragma once
#include "ptx_sm90.cuh"

namespace lk::cuda {

// A row-major matrix [rows, cols] in global memory, `row_stride` elements from row to row, and the tile
// [box_rows, box_cols] of it that one TMA instruction moves.
struct TileShape {
  int element_bytes;  // 1, 2 or 4; TMA only moves them
  int64_t rows, cols, row_stride;
  int box_rows, box_cols;
  Swizzle swizzle = Swizzle::bytes_128;
};

// What TMA can address. In a swizzled tile a row is exactly as wide as the swizzle, which is what wgmma
// reads; wider tiles are several boxes.
inline bool tensor_map_is_possible(const void* base, const TileShape& shape) {
  const auto [bytes, rows, cols, row_stride, box_rows, box_cols, swizzle] = shape;
  constexpr int kMostInBox = 256;
  constexpr int64_t kMostInMatrix = int64_t{1} << 32;
  const int row_bytes = box_cols * bytes;
  return (bytes == 1 || bytes == 2 || bytes == 4) && rows > 0 && rows <= kMostInMatrix && cols > 0 &&
         cols <= kMostInMatrix && row_stride >= cols && row_stride * bytes < int64_t{1} << 40 &&
         row_stride * bytes % 16 == 0 && reinterpret_cast<uintptr_t>(base) % 16 == 0 && base != nullptr &&
         box_rows > 0 && box_rows <= kMostInBox && box_cols > 0 && box_cols <= kMostInBox &&
         row_bytes % 16 == 0 && (swizzle == Swizzle::none || row_bytes == static_cast<int>(swizzle));
}

#ifdef LK_SIMT

inline int make_tensor_map_2d(TensorMap* map, const void* base, const TileShape& shape) {
  if (!tensor_map_is_possible(base, shape)) {
    last_error() =
        "no such tensor map: base, row stride and box rows are multiples of 16 bytes, a box has at most "
        "256 rows and columns, and a swizzled one is as wide as its swizzle";
    return LK_LAUNCH_FAILED + 1;
  }
  *map = {static_cast<char*>(const_cast<void*>(base)),
          shape.rows,
          shape.cols,
          shape.row_stride,
          shape.box_rows,
          shape.box_cols,
          static_cast<int>(shape.swizzle),
          shape.element_bytes};
  return LK_OK;
}

#else

// Returns an lk_status. `base` is a device address; the map is good as long as the memory is there.
inline int make_tensor_map_2d(TensorMap* map, const void* base, const TileShape& shape) {
  if (!tensor_map_is_possible(base, shape)) return LK_LAUNCH_FAILED + int{cudaErrorInvalidValue};
  // From the driver that the runtime has loaded: linking libcuda would keep the library from loading without
  // one.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    const bool usable = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (encode == nullptr) return LK_LAUNCH_FAILED + int{cudaErrorCallRequiresNewerDriver};

  const CUtensorMapDataType type = shape.element_bytes == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : shape.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                                              : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  const CUtensorMapSwizzle swizzle = shape.swizzle == Swizzle::bytes_128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : shape.swizzle == Swizzle::bytes_64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : shape.swizzle == Swizzle::bytes_32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                          : CU_TENSOR_MAP_SWIZZLE_NONE;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(shape.cols), static_cast<cuuint64_t>(shape.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(shape.row_stride * shape.element_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(shape.box_cols),
                             static_cast<cuuint32_t>(shape.box_rows)};
  const cuuint32_t every_element[2] = {1, 1};
  const CUresult result = encode(map, type, 2, const_cast<void*>(base), sizes, strides, box, every_element,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? LK_OK : LK_LAUNCH_FAILED + static_cast<int>(result);
}

#endif

}  // namespace lk::cuda
