// Not a header of its own: included once by a file that is compiled for AVX-512, inside its namespace.

using Rows = __m512[16];

// 16 x 16 dwords, in place.
LK_INLINE void transpose(Rows& r) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512i x = _mm512_castps_si512(r[2 * i]), y = _mm512_castps_si512(r[2 * i + 1]);
    a[2 * i] = _mm512_unpacklo_epi32(x, y);
    a[2 * i + 1] = _mm512_unpackhi_epi32(x, y);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
  // b[4i + j]: rows 4i..4i+3, columns j, j+4, j+8, j+12 in its four 128-bit lanes.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i p = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88),
                  q = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
    const __m512i s = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i t = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    r[j] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(p, s, 0x88));
    r[j + 4] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(q, t, 0x88));
    r[j + 8] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(p, s, 0xdd));
    r[j + 12] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(q, t, 0xdd));
  }
}
