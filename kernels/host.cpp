// Attention of a few query rows over keys and values in host memory, dense or as codes.  kernels/host.py is its caller.
//
// Work is cut into items of one batch row, one list of keys, up to ROWS query rows and CHUNK slots, whatever the number of
// threads, and the items' results are merged in order: the same bits on any number of threads.  An item computes all its
// scores, then their softmax, then the weighted sum of its values.  Keys and values are read where they are, nothing is
// gathered or decoded to memory, and rows further down are fetched meanwhile, those of the loop after this one too.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

extern "C" {
struct Side {  // keys or values; strides of data in bytes, of ranges in fp16 numbers
    const char* data;
    int64_t format, size, batch, head, token;  // format: bits of a code, or 0 for fp32, 1 for bf16, 16 for fp16
    const uint16_t* range;
    int64_t range_batch, range_head, range_token, groups, span;
};
struct Call {
    Side k, v;
    const char* q;  // [B, Hq, n, d], or for SUM the weights [B, Hq, n, slots]; strides in bytes
    int64_t q_format, q_batch, q_head, q_row;
    const int64_t* ids;  // [B, lists, slots], or null: slot t is key t
    int64_t ids_batch, ids_list;
    const int64_t* start;
    int64_t start_batch;
    const int64_t* length;
    int64_t length_batch, length_list;
    const float* bias;
    int64_t bias_batch, bias_head, bias_heads;
    float *p, *out, *lse, *work;
    int64_t batch, heads, q_heads, lists, n, keys, slots, causal, what, threads;
    double scale, softcap;
};
}

namespace {

enum What { ATTEND, SCORES, SUM };

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define KVLIB_AVX512
constexpr char ISA[] = "AVX-512";
constexpr int W = 16, RB = 4;  // lanes of a register; query rows that share one pass over keys or values
#elif defined(__AVX2__) && defined(__F16C__)
#define KVLIB_AVX2
constexpr char ISA[] = "AVX2";
constexpr int W = 8, RB = 2;
#elif defined(__aarch64__)
constexpr char ISA[] = "NEON";
constexpr int W = 4, RB = 4;
#else
constexpr char ISA[] = "128-bit vectors";
constexpr int W = 4, RB = 2;
#endif
constexpr int KEYS = 4;               // keys whose scores are computed side by side
constexpr int TILE = 64;              // keys that stay in the nearest cache while all rows of an item pass over them
constexpr int CHUNK = 512;            // slots of an item; kernels/host.py knows it too
constexpr int ROWS = 16;              // query rows of an item
constexpr int STRIDE = CHUNK + 16;    // floats from one row of scores to the next: slack for whole registers
constexpr int PADDED = 512 + 4 * 16;  // channels of a head in whole registers, at most
constexpr int GROUPS = 512 / 16;      // groups of channels of a head, at most
constexpr int FAR = 64;               // rows between a fetch and its use, at most
constexpr int LINE = 64;              // bytes of a cache line
constexpr float INF = std::numeric_limits<float>::infinity();

// ---- Registers

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef uint8_t vb __attribute__((vector_size(W)));
typedef float v4 __attribute__((vector_size(16)));

template <class V> inline V load(const void* from) {
    V x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
template <class V> inline void store(void* to, V x) { std::memcpy(to, &x, sizeof x); }

template <int... I> inline vf splat(float x, std::integer_sequence<int, I...>) { return vf{(static_cast<void>(I), x)...}; }
constexpr std::make_integer_sequence<int, W> ALL{};
inline vf splat(float x) { return splat(x, ALL); }

// x, kept in a register: compilers else read it from memory for each of its uses, which is what a loop may wait for.
inline vf held(vf x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}

#if defined(__clang__)
#define KVLIB_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define KVLIB_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif
// In each 128 bits, elements O and O + 1: of a and b by turns; of a, then of b.
template <int O, int... I> inline vf turns(vf a, vf b, std::integer_sequence<int, I...>) {
    return KVLIB_SHUFFLE(a, b, (I / 4 * 4 + I % 4 / 2 + O + I % 2 * W)...);
}
template <int O, int... I> inline vf pairs(vf a, vf b, std::integer_sequence<int, I...>) {
    return KVLIB_SHUFFLE(a, b, (I / 4 * 4 + I % 2 + O + I % 4 / 2 * W)...);
}
// Every second element of a and then b, from O on; and back: elements of a and b by turns, from O on.
template <int O, int... I> inline vf halves(vf a, vf b, std::integer_sequence<int, I...>) {
    return KVLIB_SHUFFLE(a, b, (2 * I + O)...);
}
template <int O, int... I> inline vf zipped(vf a, vf b, std::integer_sequence<int, I...>) {
    return KVLIB_SHUFFLE(a, b, (I / 2 + O + I % 2 * W)...);
}

inline v4 quarters(vf x) {  // the sum of a register's 128-bit parts
#if defined(KVLIB_AVX512)
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
    return (v4)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(KVLIB_AVX2)
    return (v4)_mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
#else
    return x;
#endif
}
inline v4 sums(vf a, vf b, vf c, vf d) {
    const vf ab = turns<0>(a, b, ALL) + turns<2>(a, b, ALL), cd = turns<0>(c, d, ALL) + turns<2>(c, d, ALL);
    return quarters(pairs<0>(ab, cd, ALL) + pairs<2>(ab, cd, ALL));
}
inline float sum(vf x) {
    const v4 y = quarters(x);
    return (y[0] + y[1]) + (y[2] + y[3]);
}

// exp of x <= 88 with a relative error of 1e-7 (Cephes); 0 below -87 and for -inf, NaN for NaN.
inline vf exp(vf x) {
    const vf magic = splat(12582912.0f);  // its sum with a small number holds that number, rounded, in the lowest bits
    const vf shifted = x * 1.44269504f + magic, k = shifted - magic;
    const vf f = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    vf y = f * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * f + 8.3334519073e-3f;
    y = y * f + 4.1665795894e-2f;
    y = y * f + 1.6666665459e-1f;
    y = y * f + 5.0000001201e-1f;
    y = y * f * f + f + 1.0f;
    const vf power = (vf)(((vu)shifted << 23) + (127u << 23));
    return x < splat(-87.0f) ? vf{} : y * power;
}

inline vf tanh(vf x) {  // likewise; near 0 a polynomial, where the quotient would cancel
    const vf size = x < vf{} ? -x : x, z = x * x;
    vf y = z * -5.70498872745e-3f + 2.06390887954e-2f;
    y = y * z - 5.37397155531e-2f;
    y = y * z + 1.33314422036e-1f;
    y = y * z - 3.33332819422e-1f;
    const vf capped = size > splat(20.0f) ? splat(20.0f) : size;
    const vf large = 1.0f - 2.0f / (exp(capped + capped) + 1.0f);
    return size < splat(0.625f) ? y * z * x + x : (x < vf{} ? -large : large);
}

// Asks memory for a row, into the second cache: what is on its way to the nearest holds one of its few places until it has
// come.  Inline: GCC drops calls of functions that do nothing else.
__attribute__((always_inline)) inline void fetch(const char* row, int bytes) {
    for (int i = 0; i < bytes; i += LINE) __builtin_prefetch(row + i, 0, 2);
}

// Compilers make two halves of such a conversion to a whole register.
inline vi widened(vh x) {
#if defined(KVLIB_AVX512)
    return (vi)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(KVLIB_AVX2)
    return (vi)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, vi);
#endif
}
inline vi widened(vb x) {
#if defined(KVLIB_AVX512)
    return (vi)_mm512_cvtepu8_epi32((__m128i)x);
#elif defined(KVLIB_AVX2)
    return (vi)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)x));
#else
    return __builtin_convertvector(x, vi);
#endif
}
inline vf from_half(vh h) {
#if defined(KVLIB_AVX512)
    return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(KVLIB_AVX2)
    return (vf)_mm256_cvtph_ps((__m128i)h);
#else
    const vu bits = (vu)widened(h), size = (bits & 0x7fffu) << 13;
    const vf rebiased = (vf)size * 0x1p112f;  // right for subnormal numbers too
    const vu infinite = (vu)(size >= (0x7c00u << 13)) & 0x7f800000u;
    return (vf)((vu)rebiased | infinite | (bits & 0x8000u) << 16);
#endif
}

// ---- Formats: how a register of elements (words of two bf16, bytes of codes) is read, and each plane of channels in it

struct F32 {
    static constexpr int PLANES = 1, BYTES = 4;
    static inline vi read(const char* row, int at) { return load<vi>(row + 4 * at); }
    static inline vf plane(vi x, int) { return (vf)x; }
};
struct BF16 {
    static constexpr int PLANES = 1, BYTES = 2;
    static inline vi read(const char* row, int at) { return widened(load<vh>(row + 2 * at)) << 16; }
    static inline vf plane(vi x, int) { return (vf)x; }
};
struct PairedBF16 {  // planes of every second channel: half the instructions
    static constexpr int PLANES = 2, BYTES = 4;
    static inline vi read(const char* row, int at) { return load<vi>(row + 4 * at); }
    static inline vf plane(vi x, int p) { return (vf)(p == 0 ? x << 16 : x & ~0xffff); }
};
struct F16 {
    static constexpr int PLANES = 1, BYTES = 2;
    static inline vi read(const char* row, int at) { return (vi)from_half(load<vh>(row + 2 * at)); }
    static inline vf plane(vi x, int) { return (vf)x; }
};
template <int BITS> struct Code {
    static constexpr int PLANES = 8 / BITS, BYTES = 1;
    static inline vi read(const char* row, int at) { return widened(load<vb>(row + at)); }
    static inline vf plane(vi x, int p) {
        x >>= p * BITS;
        if (p < PLANES - 1) x &= (1 << BITS) - 1;
        return __builtin_convertvector(x, vf);
    }
};

template <class Go> void with_format(int64_t format, bool paired, Go&& go) {
    switch (format) {
        case 0: return go(F32());
        case 1: return paired ? go(PairedBF16()) : go(BF16());
        case 16: return go(F16());
        case 8: return go(Code<8>());
        case 4: return go(Code<4>());
        default: return go(Code<2>());
    }
}

template <int N> using Number = std::integral_constant<int, N>;
template <class Go> void with_rows(int rows, Go&& go) {
    switch (rows) {
        case 1: return go(Number<1>());
        case 2: return go(Number<2>());
        case 3: return go(Number<std::min(3, RB)>());
        default: return go(Number<RB>());
    }
}

// Where a side's channels lie: `units` registers per plane, the last of which reaches back where a whole one would not fit.
struct Layout {
    int planes, plane, units, group, bytes, ahead;
    bool paired;
    explicit Layout(const Side& side) {
        const int64_t f = side.format;
        paired = f == 1 && side.size >= 2 * W;
        planes = f == 2 ? 4 : f == 4 || paired ? 2 : 1;
        plane = (int)side.size / planes;
        units = (plane + W - 1) / W;
        group = (int)(side.size / std::max<int64_t>(1, side.groups));
        bytes = (int)(side.size * (f == 0 ? 32 : f == 1 ? 16 : f) / 8);
        ahead = std::clamp(16384 / bytes, 16, FAR);
    }
    int floats() const { return planes * units * W; }
    int at(int u) const { return std::min(u * W, plane - W); }
    int channel(int p, int u) const { return p * plane + at(u); }
    int again(int u) const { return u * W - at(u); }  // lanes of unit u that unit u - 1 holds too
};

// ---- The two loops over keys and values

enum Ranges { NONE, SCALED, AFFINE };  // given to a code: nothing, its group's scale, its channel's scale and least value

struct Applied {  // to TILE tokens; loops look at up to KEYS - 1 more
    alignas(64) float scale[GROUPS][TILE + 16], least[GROUPS][TILE + 16];  // of each group of channels
    const uint16_t* channels[TILE + KEYS];  // of each token, its span's: scales of all channels, then least values
    int group[PADDED / 4];                  // of each register of channels
};

// Scores s [R][count] of the keys in `rows`, and of up to KEYS - 1 more.  Rows in `ahead` are fetched at the same pace.
// UNITS is lay.units where those are whole and worth unrolling, or 0.
template <class F, int R, int RANGE, int UNITS>
void dots(const Layout& lay, const Applied& applied, const char* const* rows, const char* const* ahead, int count,
          const float* q, float* s) {
    const int units = UNITS ? UNITS : lay.units;
    for (int j = 0; j < count; j += KEYS) {
        vf acc[R][KEYS] = {};
        if (ahead != nullptr)
            for (int i = 0; i < KEYS; ++i) fetch(ahead[j + i], units * W * F::BYTES);
        const auto unit = [&](int u, int at) __attribute__((always_inline)) {
            vi read[KEYS];
            for (int i = 0; i < KEYS; ++i) read[i] = F::read(rows[j + i], at);
            for (int p = 0; p < F::PLANES; ++p) {
                vf y[R];
                for (int r = 0; r < R; ++r) y[r] = held(load<vf>(q + ((r * F::PLANES + p) * units + u) * W));
                for (int i = 0; i < KEYS; ++i) {
                    vf x = F::plane(read[i], p);
                    if (RANGE == SCALED) x *= splat(applied.scale[applied.group[p * units + u]][j + i]);
                    if (RANGE == AFFINE) {
                        const uint16_t* range = applied.channels[j + i] + p * lay.plane + at;
                        x = x * from_half(load<vh>(range)) + from_half(load<vh>(range + F::PLANES * lay.plane));
                    }
                    for (int r = 0; r < R; ++r) acc[r][i] += x * y[r];
                }
            }
        };
        if (UNITS) {
#pragma GCC unroll 8
            for (int u = 0; u < UNITS; ++u) unit(u, u * W);
        } else {
            for (int u = 0; u < units; ++u) unit(u, lay.at(u));
        }
        for (int r = 0; r < R; ++r) store(s + r * STRIDE + j, sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
    }
}

// Adds to o the values in `rows` under weights [R][count], for the channels of units from .. from + U - 1.
template <class F, int R, int U, int RANGE>
void weigh(const Layout& lay, const Applied& applied, const char* const* rows, const char* const* ahead, int count,
           const float* weights, int weights_stride, int from, float* o) {
    constexpr int BYTES = W * F::BYTES;
    const auto place = [&](int r, int u, int p) { return o + r * lay.floats() + (p * lay.units + from + u) * W; };
    vf acc[R][U][F::PLANES];
    for (int r = 0; r < R; ++r)
        for (int u = 0; u < U; ++u)
            for (int p = 0; p < F::PLANES; ++p) acc[r][u][p] = load<vf>(place(r, u, p));
    for (int j = 0; j < count; ++j) {
        if (ahead != nullptr)
            for (int i = (from * BYTES + LINE - 1) / LINE * LINE; i < (from + U) * BYTES; i += LINE) fetch(ahead[j] + i, 1);
        vf x[U][F::PLANES];
        for (int u = 0; u < U; ++u) {
            const vi read = F::read(rows[j], lay.at(from + u));
            for (int p = 0; p < F::PLANES; ++p) {
                x[u][p] = F::plane(read, p);
                if (RANGE == SCALED) x[u][p] *= splat(applied.scale[applied.group[p * lay.units + from + u]][j]);
            }
        }
        for (int r = 0; r < R; ++r) {
            const vf weight = splat(weights[r * weights_stride + j]);
            for (int u = 0; u < U; ++u)
                for (int p = 0; p < F::PLANES; ++p) acc[r][u][p] += weight * x[u][p];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int u = 0; u < U; ++u)
            for (int p = 0; p < F::PLANES; ++p) store(place(r, u, p), acc[r][u][p]);
}

// ---- One item of the work

struct Scratch {
    alignas(64) float s[ROWS * STRIDE];
    alignas(64) float q[ROWS * PADDED], folded[ROWS * PADDED], o[ROWS * PADDED];
    alignas(64) float weights[ROWS * TILE];
    float total[ROWS][GROUPS];
    const char *keys[CHUNK + KEYS + FAR], *values[CHUNK + KEYS + FAR], *next[FAR];
    Applied applied;
};

struct Item {
    const Call& call;
    int64_t b, list, first, lo;  // first: its first query row among the list's; lo: its first slot
    int rows, count;             // query rows, slots
    const int64_t* ids;          // the list, or null

    int64_t query_head(int r) const { return list * (call.q_heads / call.lists) + (first + r) / call.n; }
    int64_t query(int r) const { return (first + r) % call.n; }
    int64_t place(int r) const { return (b * call.q_heads + query_head(r)) * call.n + query(r); }
    const char* row(int r) const { return call.q + b * call.q_batch + query_head(r) * call.q_head + query(r) * call.q_row; }
    int64_t head() const { return list / (call.lists / call.heads); }
    int64_t token(int64_t j) const { return ids == nullptr ? lo + j : ids[lo + j]; }
    const char* base(const Side& side) const { return side.data + b * side.batch + head() * side.head; }
    const uint16_t* range(const Side& side) const { return side.range + b * side.range_batch + head() * side.range_head; }

    // Where the tokens are; then KEYS times the last, which `dots` may read; then what is needed after these tokens.
    void find(const Side& side, const char* const* next, const char** places) const {
        const char* from = base(side);
        const int64_t step = side.token;
        if (ids == nullptr)
            for (int64_t j = 0; j < count; ++j) places[j] = from + (lo + j) * step;
        else
            for (int64_t j = 0; j < count; ++j) places[j] = from + ids[lo + j] * step;
        std::fill_n(places + count, KEYS, places[count - 1]);
        std::copy_n(next, FAR, places + count + KEYS);
    }

    // The first rows of this thread's next item, if threads keep in step.
    void foresee(const Side& side, const char** next) const {
        const int64_t later = CHUNK * call.threads, left = std::clamp<int64_t>(call.slots - lo - later, 0, FAR);
        const auto from = (uintptr_t)base(side), step = (uintptr_t)side.token;  // unsigned: it need not be an id
        for (int64_t j = 0; j < left; ++j) next[j] = (const char*)(from + (uintptr_t)token(later + j) * step);
        std::fill_n(next + left, FAR - left, base(side));
    }

    // The same where a token has one scale and, beside it, one least value.
    void find_pairs(const Side& side, int from, int n, Applied& applied) const {
        alignas(64) uint32_t pairs[TILE] = {};
        const uint16_t* base = range(side);
        if (ids == nullptr && side.range_token == 2)
            std::memcpy(pairs, base + 2 * (lo + from), 4 * n);
        else
            for (int j = 0; j < n; ++j) std::memcpy(pairs + j, base + token(from + j) * side.range_token, 4);
        for (int j = 0; j < TILE; j += W) {
            const vu both = load<vu>(pairs + j);
            store(applied.scale[0] + j, from_half(__builtin_convertvector(both & 0xffffu, vh)));
            store(applied.least[0] + j, from_half(__builtin_convertvector(both >> 16, vh)));
        }
    }

    // Scales and least values of n tokens from `from` on, by group of channels.
    void find_ranges(const Side& side, int from, int n, Applied& applied) const {
        if (side.groups == 1) return find_pairs(side, from, n, applied);
        alignas(64) uint16_t scale[TILE] = {}, least[TILE] = {};
        for (int g = 0; g < side.groups; ++g) {
            for (int j = 0; j < n; ++j) {
                const uint16_t* x = range(side) + token(from + j) * side.range_token + g;
                scale[j] = x[0];
                least[j] = x[side.groups];
            }
            for (int j = 0; j < TILE; j += W) {
                store(applied.scale[g] + j, from_half(load<vh>(scale + j)));
                store(applied.least[g] + j, from_half(load<vh>(least + j)));
            }
        }
    }
};

// Asks for the first rows, which no loop before has asked for.
__attribute__((always_inline)) inline void fetch(const Side& side, const char* const* rows, int count) {
    const Layout lay(side);
    for (int j = 0; j < std::min(count, lay.ahead); ++j) fetch(rows[j], lay.bytes);
}

bool by_token(const Side& side) { return side.range != nullptr && side.span == 1; }

void group_registers(const Layout& lay, Applied& applied) {
    for (int p = 0; p < lay.planes; ++p)
        for (int u = 0; u < lay.units; ++u) applied.group[p * lay.units + u] = lay.channel(p, u) / lay.group;
}

// The item's query rows as fp32 in the keys' layout, scaled, 0 in lanes that come twice.
void load_query(const Item& item, const Layout& lay, float* q) {
    const float scale = (float)item.call.scale;
    with_format(item.call.q_format, false, [&](auto format) {
        using F = decltype(format);
        for (int r = 0; r < item.rows; ++r) {
            const auto read = [&](int channel) { return F::plane(F::read(item.row(r), channel), 0) * scale; };
            for (int u = 0; u < lay.units; ++u)
                for (int p = 0; p < lay.planes; ++p) {
                    vf x;
                    if (lay.paired) {
                        const vf a = read(2 * lay.at(u)), b = read(2 * lay.at(u) + W);
                        x = p == 0 ? halves<0>(a, b, ALL) : halves<1>(a, b, ALL);
                    } else {
                        x = read(lay.channel(p, u));
                    }
                    for (int i = 0; i < lay.again(u); ++i) x[i] = 0;
                    store(q + r * lay.floats() + (p * lay.units + u) * W, x);
                }
        }
    });
}

// w.total [rows][groups]: the query's sums over groups of channels, by which least values are multiplied.
void total_query(const Item& item, const Layout& lay, Scratch& w) {
    for (int r = 0; r < item.rows; ++r) {
        std::fill_n(w.total[r], GROUPS, 0.0f);
        for (int i = 0; i < lay.planes * lay.units; ++i)
            w.total[r][w.applied.group[i]] += sum(load<vf>(w.q + r * lay.floats() + i * W));
    }
}

// w.folded: the query times the scales of a span's channels; w.total[r][0]: its products with their least values.
void fold_query(const Item& item, const Layout& lay, const uint16_t* range, Scratch& w) {
    for (int r = 0; r < item.rows; ++r) {
        vf total = {};
        for (int p = 0; p < lay.planes; ++p)
            for (int u = 0; u < lay.units; ++u) {
                const int i = r * lay.floats() + (p * lay.units + u) * W;
                const uint16_t* at = range + lay.channel(p, u);
                const vf x = load<vf>(w.q + i);
                store(w.folded + i, x * from_half(load<vh>(at)));
                total += x * from_half(load<vh>(at + lay.planes * lay.plane));
            }
        w.total[r][0] = sum(total);
    }
}

// w.s [rows][count]: the item's scores.  A token's range is applied to its score, and those of channels to the query, once
// per span; but several groups of a token have scales of their own, and spans in any order would be folded too often.
void score(const Item& item, Scratch& w) {
    const Side& k = item.call.k;
    const Layout lay(k);
    const bool tokens = by_token(k), channels = k.range != nullptr && !tokens, folds = channels && item.ids == nullptr;
    const int range = tokens && k.groups > 1 ? SCALED : channels && !folds ? AFFINE : NONE;
    load_query(item, lay, w.q);
    group_registers(lay, w.applied);
    if (tokens) total_query(item, lay, w);
    int64_t folded = -1;
    for (int t = 0, n; t < item.count; t += n) {
        n = std::min(TILE, item.count - t);
        if (folds) {
            const int64_t span = (item.lo + t) / k.span;
            n = (int)std::min<int64_t>(n, (span + 1) * k.span - item.lo - t);
            if (span != folded) fold_query(item, lay, item.range(k) + span * k.range_token, w);
            folded = span;
        }
        if (tokens) item.find_ranges(k, t, n, w.applied);
        for (int j = 0; j < n + KEYS && range == AFFINE; ++j)
            w.applied.channels[j] = item.range(k) + item.token(std::min(t + j, item.count - 1)) / k.span * k.range_token;
        for (int r = 0; r < item.rows; r += RB)
            with_format(k.format, lay.paired, [&](auto format) {
                with_rows(std::min(RB, item.rows - r), [&](auto rows) {
                    using F = decltype(format);
                    constexpr int R = decltype(rows)::value;
                    const char* const *at = w.keys + t, *const *ahead = r == 0 ? at + lay.ahead : nullptr;
                    const float* q = (folds ? w.folded : w.q) + r * lay.floats();
                    float* s = w.s + r * STRIDE + t;
                    if constexpr (F::BYTES == 1) {
                        if (range == SCALED) return dots<F, R, SCALED, 0>(lay, w.applied, at, ahead, n, q, s);
                        if (range == AFFINE) return dots<F, R, AFFINE, 0>(lay, w.applied, at, ahead, n, q, s);
                    }
                    constexpr int UNITS = W == 16 ? 128 / F::PLANES / W : 0;  // most models' head size
                    if (UNITS && k.size == 128) return dots<F, R, NONE, UNITS>(lay, w.applied, at, ahead, n, q, s);
                    dots<F, R, NONE, 0>(lay, w.applied, at, ahead, n, q, s);
                });
            });
        for (int r = 0; r < item.rows && (tokens || folds); ++r)
            for (int j = 0; j < n; j += W) {
                float* s = w.s + r * STRIDE + t + j;
                vf x = load<vf>(s);
                if (folds) x += w.total[r][0];
                if (tokens && range == NONE) x *= load<vf>(w.applied.scale[0] + j);
                for (int g = 0; g < k.groups && tokens; ++g) x += load<vf>(w.applied.least[g] + j) * w.total[r][g];
                store(s, x);
            }
    }
}

// From scores of row r to exp(s - max), 0 where hidden, whose max and sum are returned.
std::pair<float, float> soften(const Item& item, int r, float* s) {
    const Call& c = item.call;
    const float cap = (float)c.softcap;
    int seen = item.count;
    if (c.causal) seen = (int)std::clamp<int64_t>(c.keys - c.n + item.query(r) + 1 - item.lo, 0, item.count);
    if (cap > 0)
        for (int j = 0; j < seen; j += W) store(s + j, tanh(load<vf>(s + j) * (1 / cap)) * cap);
    if (c.bias != nullptr) {
        const int64_t head = item.query_head(r) * c.bias_heads / c.q_heads;
        const float* bias = c.bias + item.b * c.bias_batch + head * c.bias_head + item.lo;
        for (int j = 0; j < seen; ++j) s[j] = bias[j] == -INF ? -INF : s[j] + bias[j];
    }
    std::fill(s + seen, s + (item.count + W - 1) / W * W, -INF);
    vf most = splat(-INF), total = {};
    for (int j = 0; j < item.count; j += W) {
        const vf x = load<vf>(s + j);
        most = x > most ? x : most;
    }
    float m = most[0];
    for (int i = 1; i < W; ++i) m = std::max(m, most[i]);
    for (int j = 0; j < item.count; j += W) {
        const vf x = m == -INF ? vf{} : exp(load<vf>(s + j) - m);
        store(s + j, x);
        total += x;
    }
    return {m, sum(total)};
}

// out [rows][size]: the item's values under the weights w.s [rows][count].
void weigh(const Item& item, float* out, int64_t out_stride, Scratch& w) {
    const Side& v = item.call.v;
    const Layout lay(v);
    const bool tokens = by_token(v), scaled = tokens && v.groups > 1, folds = tokens && !scaled;
    group_registers(lay, w.applied);
    std::fill_n(w.o, item.rows * lay.floats(), 0.0f);
    for (int r = 0; r < item.rows; ++r) std::fill_n(w.total[r], GROUPS, 0.0f);
    for (int t = 0; t < item.count; t += TILE) {
        const int n = std::min(TILE, item.count - t);
        if (tokens) item.find_ranges(v, t, n, w.applied);
        for (int r = 0; r < item.rows; ++r)
            for (int g = 0; g < v.groups && tokens; ++g) {
                vf total = {};
                for (int j = 0; j < n; j += W) {
                    const vf p = load<vf>(w.s + r * STRIDE + t + j);
                    total += p * load<vf>(w.applied.least[g] + j);
                    if (folds) store(w.weights + r * TILE + j, p * load<vf>(w.applied.scale[g] + j));
                }
                w.total[r][g] += sum(total);
            }
        for (int r = 0; r < item.rows; r += RB)
            with_format(v.format, lay.paired, [&](auto format) {
                with_rows(std::min(RB, item.rows - r), [&](auto rows) {
                    using F = decltype(format);
                    constexpr int R = decltype(rows)::value, U = std::max(1, 4 / F::PLANES);
                    const char* const *at = w.values + t, *const *ahead = r == 0 ? at + lay.ahead : nullptr;
                    const float* weights = folds ? w.weights + r * TILE : w.s + r * STRIDE + t;
                    const int stride = folds ? TILE : STRIDE;
                    float* o = w.o + r * lay.floats();
                    const auto units = [&](auto some, int u) {
                        constexpr int N = decltype(some)::value;
                        if constexpr (F::BYTES == 1)
                            if (scaled) return weigh<F, R, N, SCALED>(lay, w.applied, at, ahead, n, weights, stride, u, o);
                        weigh<F, R, N, NONE>(lay, w.applied, at, ahead, n, weights, stride, u, o);
                    };
                    int u = 0;
                    for (; u + U <= lay.units; u += U) units(Number<U>(), u);
                    for (; u < lay.units; ++u) units(Number<1>(), u);
                });
            });
    }
    for (int r = 0; r < item.rows; ++r)
        for (int u = 0; u < lay.units; ++u) {  // in order: what comes twice is the same
            const auto channels = [&](int p) {
                const int i = p * lay.units + u;
                return load<vf>(w.o + r * lay.floats() + i * W) + w.total[r][w.applied.group[i]];
            };
            float* to = out + r * out_stride;
            if (lay.paired) {
                store(to + 2 * lay.at(u), zipped<0>(channels(0), channels(1), ALL));
                store(to + 2 * lay.at(u) + W, zipped<W / 2>(channels(0), channels(1), ALL));
            } else {
                for (int p = 0; p < lay.planes; ++p) store(to + lay.channel(p, u), channels(p));
            }
        }
}

// ---- All of it

struct Plan {
    const Call& call;
    int64_t rows, passes, chunks, size;  // query rows of a list, the cuts through them and its slots; floats of a result
    explicit Plan(const Call& c) : call(c) {
        rows = c.q_heads / c.lists * c.n;
        passes = (rows + ROWS - 1) / ROWS;
        chunks = (c.slots + CHUNK - 1) / CHUNK;
        size = c.v.size + 2;
    }
    int64_t items() const { return call.batch * call.lists * passes * chunks; }
    // In call.work [B, lists, rows, chunks]: an output, its largest score, its sum.
    float* result(int64_t b, int64_t list, int64_t row, int64_t chunk) const {
        return call.work + (((b * call.lists + list) * rows + row) * chunks + chunk) * size;
    }
    int64_t start(int64_t b) const {
        return call.start == nullptr ? 0 : std::max<int64_t>(0, call.start[b * call.start_batch]);
    }
    int64_t end(int64_t b, int64_t list) const {
        if (call.length == nullptr) return call.slots;
        return std::min(call.slots, call.length[b * call.length_batch + list * call.length_list]);
    }

    // One item; false where its ids name keys that do not exist.
    bool run(int64_t number) const {
        const Call& c = call;
        const int64_t chunk = number % chunks, first = number / chunks % passes * ROWS, place = number / chunks / passes;
        const int64_t b = place / c.lists, list = place % c.lists, lo = std::max(chunk * CHUNK, start(b));
        const int64_t* ids = c.ids == nullptr ? nullptr : c.ids + b * c.ids_batch + list * c.ids_list;
        const int count = (int)std::max<int64_t>(0, std::min((chunk + 1) * CHUNK, end(b, list)) - lo);
        const Item item{c, b, list, first, lo, (int)std::min<int64_t>(ROWS, rows - first), count, ids};
        bool known = true;
        for (int j = 0; j < count && ids != nullptr; ++j) known &= (uint64_t)ids[lo + j] < (uint64_t)c.keys;
        if (!known) return false;
        Scratch w;
        if (count > 0) compute(item, w);
        for (int r = 0; r < item.rows && c.what != SUM; ++r) {
            float* s = w.s + r * STRIDE;
            if (c.what == SCORES) {
                std::copy_n(s, count, c.out + item.place(r) * c.slots + lo);
                continue;
            }
            const auto [m, l] = soften(item, r, s);
            float* to = result(b, list, first + r, chunk) + c.v.size;
            to[0] = m;
            to[1] = l;
            if (c.p != nullptr) std::copy_n(s, count, c.p + item.place(r) * c.slots + lo);
        }
        if (c.what != SCORES && count > 0) weigh(item, result(b, list, first, chunk), chunks * size, w);
        return true;
    }

    // The scores, or the weights given, and where the values are.
    void compute(const Item& item, Scratch& w) const {
        const Call& c = call;
        item.foresee(c.what == SUM ? c.v : c.k, w.next);
        if (c.what != SCORES) item.find(c.v, w.next, w.values);
        if (c.what != SUM) {
            item.find(c.k, c.what == SCORES ? w.next : w.values, w.keys);
            fetch(c.k, w.keys, item.count);
            score(item, w);
        }
        for (int r = 0; r < item.rows && c.what == SUM; ++r) {
            std::memcpy(w.s + r * STRIDE, item.row(r) + 4 * item.lo, 4 * item.count);
            std::fill_n(w.s + r * STRIDE + item.count, W, 0.0f);
        }
        if (c.what != SCORES) fetch(c.v, w.values, item.count);
    }

    // The results of all chunks of a query row as one; rows are numbered as in out [B, Hq, n].
    void merge(int64_t row) const {
        const Call& c = call;
        const int64_t list = row / rows % c.lists, b = row / rows / c.lists, dv = c.v.size;
        const float* parts = result(b, list, row % rows, 0);
        const auto largest = [&](int64_t i) { return parts[i * size + dv]; };
        const auto mass = [&](int64_t i) { return parts[i * size + dv + 1]; };
        float m = -INF, l = 0;
        for (int64_t i = 0; i < chunks && c.what != SUM; ++i) m = std::max(m, largest(i));
        float* out = c.out + row * dv;
        std::fill_n(out, dv, 0.0f);
        for (int64_t i = 0; i < chunks; ++i) {
            if (c.what != SUM && mass(i) == 0) continue;  // its output was not written
            const float weight = c.what == SUM ? 1.0f : std::exp(largest(i) - m);
            if (c.what != SUM) l += weight * mass(i);
            for (int64_t x = 0; x < dv; ++x) out[x] += weight * parts[i * size + x];
        }
        if (c.what == SUM) return;
        const float inverse = l == 0 ? 0.0f : 1 / l;
        for (int64_t x = 0; x < dv; ++x) out[x] *= inverse;
        c.lse[row] = l == 0 ? -INF : m + std::log(l);
        if (c.p == nullptr) return;
        float* p = c.p + row * c.slots;
        const int64_t lo = std::min(start(b), c.slots), hi = std::max(lo, end(b, list));
        std::fill(p, p + lo, 0.0f);
        std::fill(p + hi, p + c.slots, 0.0f);
        for (int64_t i = 0; i < chunks; ++i) {
            const float weight = mass(i) == 0 ? 0.0f : std::exp(largest(i) - m) * inverse;
            for (int64_t j = std::max(lo, i * CHUNK); j < std::min(hi, (i + 1) * CHUNK); ++j) p[j] *= weight;
        }
    }
};

}  // namespace

extern "C" {

const char* kvlib_isa() { return ISA; }

// Runs a call; false where ids name keys that do not exist.
bool kvlib_run(const Call* call) {
    const Plan plan(*call);
    const int64_t items = plan.items(), rows = call->what == SCORES ? 0 : call->batch * call->lists * plan.rows;
    const bool parallel = call->threads > 1 && items > 1 && items * std::min<int64_t>(call->slots, CHUNK) >= 4096;
    bool known = true;
#pragma omp parallel num_threads((int)call->threads) if (parallel)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < items; ++i)
            if (!plan.run(i)) {
#pragma omp atomic write
                known = false;
            }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; ++i) plan.merge(i);
    }
    return known;
}

// The sum of data as 32-bit words, to the last whole 512 bytes or so: the pace at which memory can be read here.
uint32_t kvlib_read(const char* data, int64_t bytes, int64_t threads) {
    constexpr int64_t PIECE = 1 << 18;
    uint32_t total = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)threads) if (threads > 1) reduction(+ : total)
    for (int64_t lo = 0; lo < bytes; lo += PIECE) {
        vu acc[8] = {};
        for (int64_t at = lo; at + (int64_t)sizeof acc <= std::min(bytes, lo + PIECE); at += sizeof acc)
            for (int j = 0; j < 8; ++j) acc[j] += load<vu>(data + at + 4 * W * j);
        for (int j = 1; j < 8; ++j) acc[0] += acc[j];
        for (int j = 0; j < W; ++j) total += acc[0][j];
    }
    return total;
}
}
