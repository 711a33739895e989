//! Sixteen lanes in two AVX2 registers.

use crate::cpu::isa::Avx2;
use crate::cpu::lanes::{Gemm, Kernel, Simd, W, gemm};
use std::arch::x86_64::*;

/// # Safety
/// The CPU has the features: whoever holds a [`Avx2`] may call.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn with_features<K: Kernel>(s: Avx2, k: K) -> K::Out {
    k.run(s)
}

/// Two registers: lanes 0..8 and 8..16.
#[derive(Clone, Copy)]
pub struct V(__m256, __m256);

// SAFETY (every block below): the token proves the features; pointers are the caller's contract.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    type V = V;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, k: K) -> K::Out {
        unsafe { with_features(self, k) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> V {
        let v = unsafe { _mm256_set1_ps(x) };
        V(v, v)
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> V {
        unsafe { V(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(self, v: V, p: *mut f32) {
        unsafe {
            _mm256_storeu_ps(p, v.0);
            _mm256_storeu_ps(p.add(8), v.1);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> V {
        unsafe {
            V(_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(16).cast())))
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, v: V, p: *mut u8) {
        unsafe {
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0));
            _mm_storeu_si128(p.add(16).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.1));
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> V {
        #[inline(always)]
        unsafe fn half(p: *const u8) -> __m256 {
            unsafe {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }
        }
        unsafe { V(half(p), half(p.add(16))) }
    }
    #[inline(always)]
    unsafe fn splat_f16(self, p: *const u8) -> V {
        unsafe {
            let v = _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(
                p.cast::<u16>().read_unaligned(),
            ))));
            V(v, v)
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const u8) -> V {
        #[inline(always)]
        unsafe fn half(p: *const u8) -> __m256 {
            unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
        }
        unsafe { V(half(p), half(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_u4<const HIGH: bool>(self, p: *const u8) -> V {
        #[inline(always)]
        unsafe fn half<const HIGH: bool>(p: *const u8) -> __m256 {
            unsafe {
                let wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
                let nibble = if HIGH {
                    _mm256_srli_epi32::<4>(wide)
                } else {
                    _mm256_and_si256(wide, _mm256_set1_epi32(15))
                };
                _mm256_cvtepi32_ps(nibble)
            }
        }
        unsafe { V(half::<HIGH>(p), half::<HIGH>(p.add(8))) }
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        unsafe { V(_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        unsafe { V(_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        unsafe { V(_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        unsafe { V(_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        unsafe { V(_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        unsafe { V(_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        unsafe { V(_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)) }
    }
    #[inline(always)]
    fn pick(self, a: V, b: V, x: V, y: V) -> V {
        unsafe {
            let (m, n) = (_mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0), _mm256_cmp_ps::<_CMP_LT_OQ>(a.1, b.1));
            V(_mm256_blendv_ps(y.0, x.0, m), _mm256_blendv_ps(y.1, x.1, n))
        }
    }
    #[inline(always)]
    fn round(self, a: V) -> V {
        const R: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        unsafe { V(_mm256_round_ps::<R>(a.0), _mm256_round_ps::<R>(a.1)) }
    }
    #[inline(always)]
    fn scale2(self, a: V, n: V) -> V {
        #[inline(always)]
        unsafe fn half(a: __m256, n: __m256) -> __m256 {
            unsafe {
                let n = _mm256_max_ps(n, _mm256_set1_ps(-127.0));
                let e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(e)))
            }
        }
        unsafe { V(half(a.0, n.0), half(a.1, n.1)) }
    }
    #[inline(always)]
    fn sum(self, a: V) -> f32 {
        unsafe {
            let h = _mm256_add_ps(a.0, a.1);
            let q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps::<1>(h));
            let d = _mm_add_ps(q, _mm_movehl_ps(q, q));
            _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)))
        }
    }
    #[inline(always)]
    fn sums(self, r: &[V; W]) -> V {
        // Four rounds of "add the halves"; the rows enter in the order that leaves lane j with row j.
        #[inline(always)]
        unsafe fn pair(a: V, b: V) -> __m256 {
            unsafe {
                let (a, b) = (_mm256_add_ps(a.0, a.1), _mm256_add_ps(b.0, b.1));
                _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
            }
        }
        #[inline(always)]
        unsafe fn eight(r: &[V]) -> __m256 {
            unsafe {
                let (x, y) = (pair(r[0], r[4]), pair(r[1], r[5]));
                let (z, w) = (pair(r[2], r[6]), pair(r[3], r[7]));
                let p = _mm256_add_ps(_mm256_shuffle_ps::<0x44>(x, y), _mm256_shuffle_ps::<0xEE>(x, y));
                let q = _mm256_add_ps(_mm256_shuffle_ps::<0x44>(z, w), _mm256_shuffle_ps::<0xEE>(z, w));
                _mm256_add_ps(_mm256_shuffle_ps::<0x88>(p, q), _mm256_shuffle_ps::<0xDD>(p, q))
            }
        }
        unsafe { V(eight(&r[..8]), eight(&r[8..])) }
    }
    #[inline(always)]
    fn hmax(self, a: V) -> f32 {
        unsafe {
            let low = _mm256_set1_ps(f32::NEG_INFINITY);
            let h = _mm256_max_ps(_mm256_max_ps(a.0, low), _mm256_max_ps(a.1, low));
            let q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps::<1>(h));
            let d = _mm_max_ps(q, _mm_movehl_ps(q, q));
            _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)))
        }
    }
    #[inline(always)]
    unsafe fn gemm(self, g: Gemm) {
        unsafe { gemm::<Self, 6, 3>(self, g) }
    }
}
