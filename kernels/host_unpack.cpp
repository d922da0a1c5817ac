// Codes and pruned vectors as fp32 or whole vectors again, on the CPU: see kernels/unpack.py and kernels/expand.py.
//
// Loops are written so that compilers make vectors of them: a plane of codes at a time, then ranges.

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define KVLIB_AVX512
#endif

extern "C" {
struct Planes {  // codes of 1, 2, 3, 4 or 8 bits; strides in bytes
    const uint8_t* data;
    int64_t bits, batch, head, token;
};
struct Unpack {
    Planes lower, upper;  // upper.data: null where there is none
    const char* range;    // [B, H, rows, 2 or 1, groups], fp16 or fp32; strides in numbers
    int64_t wide, range_batch, range_head, range_row, range_pair, groups, span, least;
    const float* levels;  // or null: codes stand for themselves
    float* out;           // [B, H, tokens, size]
    int64_t batch, heads, tokens, size, threads;
};
struct Expand {
    Planes bitmap;
    const char* kept;  // strides in bytes
    int64_t item, kept_batch, kept_head, kept_token, k;
    char* out;
    int64_t batch, heads, tokens, size, threads;
};
}

namespace {

constexpr int64_t MOST = 1024;  // channels of a vector; kernels/host_unpack.py knows it too
constexpr int64_t BLOCK = 64;   // tokens of an item

inline float from_half(uint16_t half) {
    const uint32_t size = (half & 0x7fffu) << 13;
    float rebiased;
    std::memcpy(&rebiased, &size, 4);
    rebiased *= 0x1p112f;  // right for subnormal numbers too
    uint32_t bits;
    std::memcpy(&bits, &rebiased, 4);
    bits |= (size >= (0x7c00u << 13) ? 0x7f800000u : 0u) | (half & 0x8000u) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

void widen(const char* from, bool wide, int64_t count, float* to) {
    if (wide) {
        std::memcpy(to, from, 4 * count);
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        uint16_t half;
        std::memcpy(&half, from + 2 * i, 2);
        to[i] = from_half(half);
    }
}

typedef uint8_t v16 __attribute__((vector_size(16)));

// Adds the codes of a token to those in `codes`, `shift` bits up.
template <int BITS> void take_apart(const uint8_t* __restrict row, int64_t size, int shift, uint8_t* __restrict codes) {
    constexpr uint8_t MASK = (1 << BITS) - 1;
    const int64_t bytes = size * BITS / 8, whole = bytes / 16 * 16;
    for (int64_t j = 0; j < whole; j += 16) {
        v16 x, known;
        std::memcpy(&x, row + j, 16);
        for (int p = 0; p < 8 / BITS; ++p) {
            uint8_t* to = codes + p * bytes + j;
            std::memcpy(&known, to, 16);
            known |= ((x >> (uint8_t)(p * BITS)) & MASK) << (uint8_t)shift;
            std::memcpy(to, &known, 16);
        }
    }
    for (int p = 0; p < 8 / BITS; ++p)
        for (int64_t j = whole; j < bytes; ++j) codes[p * bytes + j] |= (uint8_t)(((row[j] >> p * BITS) & MASK) << shift);
}
void take_apart(const uint8_t* __restrict row, int64_t bits, int64_t size, int shift, uint8_t* __restrict codes) {
    switch (bits) {
        case 1: return take_apart<1>(row, size, shift, codes);
        case 2: return take_apart<2>(row, size, shift, codes);
        case 3:
            take_apart<2>(row, size, shift, codes);
            return take_apart<1>(row + size / 4, size, shift + 2, codes);
        case 4: return take_apart<4>(row, size, shift, codes);
        default: return take_apart<8>(row, size, shift, codes);
    }
}

struct Place {
    int64_t b, h, first, last;
};
// The item of that number of [batch, heads, blocks of tokens].
template <class Call> Place place_of(const Call& c, int64_t number) {
    const int64_t blocks = (c.tokens + BLOCK - 1) / BLOCK, first = number % blocks * BLOCK, row = number / blocks;
    return {row / c.heads, row % c.heads, first, std::min(c.tokens, first + BLOCK)};
}
template <class Call> int64_t items(const Call& c) { return c.batch * c.heads * ((c.tokens + BLOCK - 1) / BLOCK); }

inline const uint8_t* at(const Planes& x, const Place& place, int64_t t) {
    return x.data + place.b * x.batch + place.h * x.head + t * x.token;
}

void unpack(const Unpack& c, const Place& place) {
    float scale[MOST], least[MOST], x[MOST];
    uint8_t codes[MOST];
    std::fill_n(least, c.groups, -0.0f);  // which leaves every number as it is
    const int64_t group = c.size / c.groups, item = c.wide ? 4 : 2;
    int64_t known = -1;
    for (int64_t t = place.first; t < place.last; ++t) {
        std::fill_n(codes, c.size, 0);
        take_apart(at(c.lower, place, t), c.lower.bits, c.size, 0, codes);
        if (c.upper.data) take_apart(at(c.upper, place, t), c.upper.bits, c.size, (int)c.lower.bits, codes);
        if (t / c.span != known) {
            known = t / c.span;
            const int64_t from = place.b * c.range_batch + place.h * c.range_head + known * c.range_row;
            widen(c.range + from * item, c.wide, c.groups, scale);
            if (c.least) widen(c.range + (from + c.range_pair) * item, c.wide, c.groups, least);
        }
        if (c.levels)
            for (int64_t i = 0; i < c.size; ++i) x[i] = c.levels[codes[i]];
        else
            for (int64_t i = 0; i < c.size; ++i) x[i] = (float)(int)codes[i];
        float* out = c.out + ((place.b * c.heads + place.h) * c.tokens + t) * c.size;
        if (group == 1)
            for (int64_t i = 0; i < c.size; ++i) out[i] = x[i] * scale[i] + least[i];
        else
            for (int64_t g = 0; g < c.groups; ++g) {
                const float s = scale[g], l = least[g];
                for (int64_t i = g * group; i < (g + 1) * group; ++i) out[i] = x[i] * s + l;
            }
    }
}

// out [size]: kept[n] where the n-th of bits [size] that is 1 stands, else 0.  Both have room for 16 more, zeros from their
// ends on.
template <class T> void spread(const uint8_t* __restrict bits, const T* __restrict kept, int64_t k, int64_t size, T* __restrict out) {
    int64_t n = 0;
#if defined(KVLIB_AVX512)
    for (int64_t i = 0; i < size; i += 16) {
        const __m128i some = _mm_loadu_si128((const __m128i*)(bits + i));
        const __mmask16 marked = _mm_test_epi8_mask(some, some), inside = size - i < 16 ? (1 << (size - i)) - 1 : 0xffff;
        if constexpr (sizeof(T) == 4)
            _mm512_mask_storeu_epi32(out + i, inside, _mm512_maskz_expand_epi32(marked, _mm512_loadu_si512(kept + n)));
        else {
            const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(kept + n)));
            _mm256_mask_storeu_epi16(out + i, inside, _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(marked, wide)));
        }
        n = std::min(k, n + __builtin_popcount(marked));
    }
#else
    for (int64_t i = 0; i < size; ++i) {  // no branches, which nobody could foresee
        out[i] = kept[n] & (T) - (T)bits[i];
        n = std::min<int64_t>(k, n + bits[i]);
    }
#endif
}

template <class T> void expand(const Expand& c, const Place& place) {
    uint8_t bits[MOST + 16] = {};
    T kept[MOST + 32] = {};
    for (int64_t t = place.first; t < place.last; ++t) {
        std::fill_n(bits, c.size, 0);
        take_apart(at(c.bitmap, place, t), 1, c.size, 0, bits);
        std::memcpy(kept, c.kept + place.b * c.kept_batch + place.h * c.kept_head + t * c.kept_token, c.k * sizeof(T));
        T* out = (T*)c.out + ((place.b * c.heads + place.h) * c.tokens + t) * c.size;
        spread(bits, kept, c.k, c.size, out);
    }
}

template <class Call> bool parallel(const Call& c) { return c.threads > 1 && c.batch * c.heads * c.tokens * c.size >= 65536; }

}  // namespace

extern "C" {

void kvlib_unpack(const Unpack* call) {
    const int64_t count = items(*call);
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)call->threads) if (parallel(*call))
    for (int64_t i = 0; i < count; ++i) unpack(*call, place_of(*call, i));
}

void kvlib_expand(const Expand* call) {
    const int64_t count = items(*call);
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)call->threads) if (parallel(*call))
    for (int64_t i = 0; i < count; ++i) {
        if (call->item == 4) expand<uint32_t>(*call, place_of(*call, i));
        else expand<uint16_t>(*call, place_of(*call, i));
    }
}
}
