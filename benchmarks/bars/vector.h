// One vector of float32 under one name for AVX-512 and AVX2: compile with -DLANES=16 or -DLANES=8.
#pragma once
#include <immintrin.h>

#include <cstddef>

#if LANES == 16
using Vector = __m512;
static inline Vector zero() { return _mm512_setzero_ps(); }
static inline Vector broadcast(float value) { return _mm512_set1_ps(value); }
static inline Vector load(const float* p) { return _mm512_load_ps(p); }
static inline Vector load_unaligned(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vector v) { _mm512_store_ps(p, v); }
static inline void store_unaligned(float* p, Vector v) { _mm512_storeu_ps(p, v); }
static inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
#elif LANES == 8
using Vector = __m256;
static inline Vector zero() { return _mm256_setzero_ps(); }
static inline Vector broadcast(float value) { return _mm256_set1_ps(value); }
static inline Vector load(const float* p) { return _mm256_load_ps(p); }
static inline Vector load_unaligned(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vector v) { _mm256_store_ps(p, v); }
static inline void store_unaligned(float* p, Vector v) { _mm256_storeu_ps(p, v); }
static inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
#else
#error "compile with -DLANES=16 (AVX-512) or -DLANES=8 (AVX2)"
#endif
