// Attention of a few query rows over keys and values in host memory, dense or as codes: kernels/host.py is its only caller.
//
// Work is cut into items of one (batch row, list of keys, up to ROWS query rows, CHUNK slots), whatever the number of threads, and
// the items' partial results are merged in order: the same bits on any number of threads.  An item computes all its scores, then
// their softmax, then the weighted sum.  Keys and values are read in place; nothing is gathered or decoded to memory.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
constexpr char ISA[] = "AVX-512";
constexpr int W = 16, RB = 4;  // lanes of a register; query rows that share one pass over keys or values
#elif defined(__AVX2__)
constexpr char ISA[] = "AVX2";
constexpr int W = 8, RB = 2;
#elif defined(__aarch64__)
constexpr char ISA[] = "NEON";
constexpr int W = 4, RB = 4;
#else
constexpr char ISA[] = "128-bit vectors";
constexpr int W = 4, RB = 2;
#endif
constexpr int KEYS = 4;       // keys whose scores are computed side by side
#ifndef TL
#define TL 64
#endif
constexpr int TILE = TL;
#ifndef CK
#define CK 1024
#endif
constexpr int CHUNK = CK;
constexpr int ROWS = 32;      // query rows of an item
constexpr int STRIDE = CHUNK + 16;      // floats between rows of scores: slack for whole registers, and no two rows in one cache set
constexpr int PADDED = 512 + 4 * 16;    // channels of a head in whole registers, at most
constexpr int GROUPS = 512 / 16;        // groups of channels of a head, at most
constexpr int FAR = 64;                 // keys or values between a prefetch and its use, at most
constexpr int LINE = 64;                // bytes
constexpr float INF = std::numeric_limits<float>::infinity();

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

// x in a register: compilers else read it again for each of its uses, and reading is what a loop may wait for.
inline vf held(vf x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}

template <int... I> inline vf splat(float x, std::integer_sequence<int, I...>) { return vf{(static_cast<void>(I), x)...}; }
inline vf splat(float x) { return splat(x, std::make_integer_sequence<int, W>()); }
inline vf larger(vf a, vf b) { return a > b ? a : b; }

#if defined(__clang__)
#define KVLIB_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define KVLIB_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif
// Within each 128 bits: elements o, o + 1 of a and b by turns, and pairs o, o + 1 of a and then b.
template <int O, int... I> inline vf turns(vf a, vf b, std::integer_sequence<int, I...>) {
    return KVLIB_SHUFFLE(a, b, (I / 4 * 4 + I % 4 / 2 + O + I % 2 * W)...);
}
template <int O, int... I> inline vf pairs(vf a, vf b, std::integer_sequence<int, I...>) {
    return KVLIB_SHUFFLE(a, b, (I / 4 * 4 + I % 2 + O + I % 4 / 2 * W)...);
}
// Every second element of a and b from O on; and elements O, O + 1, ... of a and b by turns.
template <int O, int... I> inline vf halves(vf a, vf b, std::integer_sequence<int, I...>) {
    return KVLIB_SHUFFLE(a, b, (2 * I + O)...);
}
template <int O, int... I> inline vf zipped(vf a, vf b, std::integer_sequence<int, I...>) {
    return KVLIB_SHUFFLE(a, b, (I / 2 + O + I % 2 * W)...);
}
constexpr std::make_integer_sequence<int, W> ALL{};

inline v4 quarters(vf x) {  // the sum of a register's 128-bit parts
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
    return (v4)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
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
inline float most(vf x) {
    float m = x[0];
    for (int i = 1; i < W; ++i) m = std::max(m, x[i]);
    return m;
}

// exp of x <= 88 with a relative error of 1e-7 (Cephes), 0 below -87 and for -inf, NaN for NaN.
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

inline vf tanh(vf x) {
    const vf size = x < vf{} ? -x : x, z = x * x;
    vf y = z * -5.70498872745e-3f + 2.06390887954e-2f;
    y = y * z - 5.37397155531e-2f;
    y = y * z + 1.33314422036e-1f;
    y = y * z - 3.33332819422e-1f;
    const vf capped = size > splat(20.0f) ? splat(20.0f) : size;
    const vf far = 1.0f - 2.0f / (exp(capped + capped) + 1.0f);
    return size < splat(0.625f) ? y * z * x + x : (x < vf{} ? -far : far);
}

// Compilers make two halves of a conversion to a whole register.
inline vi widened(vh x) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, vi);
#endif
}
inline vi widened(vb x) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu8_epi32((__m128i)x);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)x));
#else
    return __builtin_convertvector(x, vi);
#endif
}

inline vf from_half(vh h) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps((__m128i)h);
#else
    const vu bits = (vu)widened(h), size = (bits & 0x7fffu) << 13;
    const vf small = (vf)size * 0x1p112f;  // the exponent's bias, and subnormal numbers
    const vu infinite = (vu)(size >= (0x7c00u << 13)) & 0x7f800000u;
    return (vf)((vu)small | infinite | (bits & 0x8000u) << 16);
#endif
}

// A format: how a register of a row's elements (codes: bytes) is read, and each plane's channels in it.
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
struct Pairs {  // bf16 as words of two neighbouring channels, half the work of BF16
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

}  // namespace

extern "C" {
struct Side {  // keys or values; strides of `data` in bytes, of `range` in fp16 numbers
    const char* data;
    int64_t format, size, batch, head, token;  // format: bits of a code, or 0 fp32, 1 bf16, 16 fp16
    const uint16_t* range;
    int64_t range_batch, range_head, range_token, groups, span;
};
struct Call {
    Side k, v;
    const char* q;  // [B, Hq, n, d], or for SUM the weights [B, Hq, n, slots]; strides in bytes
    int64_t q_format, q_batch, q_head, q_row;
    const int64_t* ids;  // [B, lists, slots] or null: slot t is key t
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
enum Ranges { NONE, SCALED, AFFINE };  // what is applied to codes one by one: nothing, their group's scale, scale and least

// Where a side's channels lie: registers of W channels, `units` per plane, the last reaching back where it would not fit.
struct Layout {
    int planes, plane, units, group, ahead;
    bool paired;  // planes are of every second channel
    explicit Layout(const Side& side) {
        paired = side.format == 1 && side.size >= 2 * W;
        planes = side.format == 2 ? 4 : side.format == 4 || paired ? 2 : 1;
        plane = (int)side.size / planes;
        units = (plane + W - 1) / W;
        ahead = std::clamp(16384 / bytes(side), 16, FAR);
        group = (int)(side.size / std::max<int64_t>(1, side.groups));
    }
    static int bytes(const Side& side) { return (int)(side.size * (side.format == 0 ? 32 : side.format == 1 ? 16 : side.format) / 8); }
    int floats() const { return planes * units * W; }
    int at(int u) const { return std::min(u * W, plane - W); }
    int channel(int p, int u) const { return p * plane + at(u); }
    int again(int u) const { return u * W - at(u); }  // lanes of unit u that unit u - 1 holds too
};

// What is applied to the codes of TILE tokens.
struct Applied {
    alignas(64) float scale[GROUPS][TILE + W], least[GROUPS][TILE + W];  // of each group of channels
    const uint16_t* channels[TILE + KEYS];                              // of each token: its span's scales of all channels, then least
    int group[PADDED / W];                                       // the group of each register of channels
};

struct Scratch {
    alignas(64) float s[ROWS * STRIDE];
    alignas(64) float q[ROWS * PADDED], folded[ROWS * PADDED], o[ROWS * PADDED];
    alignas(64) float weights[ROWS * TILE];
    float total[ROWS][GROUPS];
    const char *keys[CHUNK + FAR + KEYS], *values[CHUNK + FAR + KEYS];
    Applied applied;
};

// Scores s [R][count] of the keys in `rows`, and of up to KEYS - 1 more; the rows from `ahead` on are fetched.
template <class F, int R, int RANGE>
void dots(const Layout& lay, const Applied& applied, const char* const* rows, const char* const* ahead, int count, const float* q,
          float* s) {
    const int stride = lay.floats();
    for (int j = 0; j < count; j += KEYS) {
        const char* key[KEYS];
        for (int i = 0; i < KEYS; ++i) key[i] = rows[j + i];
        vf acc[R][KEYS] = {};
        for (int u = 0; u < lay.units; ++u) {
            const int at = lay.at(u);
            vi read[KEYS];
            for (int i = 0; i < KEYS; ++i) read[i] = F::read(key[i], at);
            if (ahead != nullptr && u % std::max(1, LINE / (W * F::BYTES)) == 0)
                for (int i = 0; i < KEYS; ++i) __builtin_prefetch(ahead[j + i] + at * F::BYTES);
            for (int p = 0; p < F::PLANES; ++p) {
                vf y[R];
                for (int r = 0; r < R; ++r) y[r] = held(load<vf>(q + r * stride + (p * lay.units + u) * W));
                for (int i = 0; i < KEYS; ++i) {
                    vf x = F::plane(read[i], p);
                    if (RANGE == SCALED) x *= splat(applied.scale[applied.group[p * lay.units + u]][j + i]);
                    if (RANGE == AFFINE) {
                        const uint16_t* range = applied.channels[j + i] + p * lay.plane + at;
                        x = x * from_half(load<vh>(range)) + from_half(load<vh>(range + F::PLANES * lay.plane));
                    }
                    for (int r = 0; r < R; ++r) acc[r][i] += x * y[r];
                }
            }
        }
        for (int r = 0; r < R; ++r) store(s + r * STRIDE + j, sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
    }
}

// Adds to o the values in `rows` under weights [R][count], channels of units `from` .. `from` + U - 1.
template <class F, int R, int U, int RANGE>
void weigh(const Layout& lay, const Applied& applied, const char* const* rows, const char* const* ahead, int count,
           const float* weights, int weights_stride, int from, float* o) {
    constexpr int BYTES = W * F::BYTES;
    const int stride = lay.floats();
    vf acc[R][U][F::PLANES];
    for (int r = 0; r < R; ++r)
        for (int u = 0; u < U; ++u)
            for (int p = 0; p < F::PLANES; ++p) acc[r][u][p] = load<vf>(o + r * stride + (p * lay.units + from + u) * W);
    for (int j = 0; j < count; ++j) {
        if (ahead != nullptr)
            for (int i = (from * BYTES + LINE - 1) / LINE * LINE; i < (from + U) * BYTES; i += LINE)
                __builtin_prefetch(ahead[j] + i);
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
            for (int p = 0; p < F::PLANES; ++p) store(o + r * stride + (p * lay.units + from + u) * W, acc[r][u][p]);
}

template <int N> using Number = std::integral_constant<int, N>;

template <class Go> void with_format(int64_t format, bool paired, Go&& go) {
    switch (format) {
        case 0: return go(F32());
        case 1: return paired ? go(Pairs()) : go(BF16());
        case 16: return go(F16());
        case 8: return go(Code<8>());
        case 4: return go(Code<4>());
        default: return go(Code<2>());
    }
}

template <class Go> void with_rows(int rows, Go&& go) {
    switch (rows) {
        case 1: return go(Number<1>());
        case 2: return go(Number<2>());
        case 3: return go(Number<std::min(3, RB)>());
        default: return go(Number<RB>());
    }
}

bool by_token(const Side& side) { return side.range != nullptr && side.span == 1; }

// One item of the work and where its tokens are.
struct Item {
    const Call& call;
    int64_t b, list, chunk, first, lo;  // first: its first query row among the list's; lo: its first slot
    int rows, count;                    // query rows, slots
    const int64_t* ids;

    int64_t query_head(int r) const { return list * (call.q_heads / call.lists) + (first + r) / call.n; }
    int64_t query(int r) const { return (first + r) % call.n; }
    int64_t token(int64_t j) const { return ids == nullptr ? lo + j : ids[lo + j]; }
    int64_t head() const { return list / (call.lists / call.heads); }

    const char* base(const Side& side) const { return side.data + b * side.batch + head() * side.head; }

    // Where tokens are; the last some times more, as loops take KEYS at once; then what is needed next, for loops to look ahead.
    void find(const Side& side, const char** places, const char* const* next) const {
        const int64_t step = side.token;
        const char* from = base(side);
        if (ids == nullptr)
            for (int64_t j = 0; j < count; ++j) places[j] = from + (lo + j) * step;
        else
            for (int64_t j = 0; j < count; ++j) places[j] = from + ids[lo + j] * step;
        std::fill_n(places + count, KEYS, places[count - 1]);
        std::copy_n(next, FAR, places + count + KEYS);
    }
    // The first rows of the item after this one, if threads keep in step.
    void foresee(const Side& side, const char** next) const {
        const int64_t later = CHUNK * call.threads, left = std::clamp<int64_t>(call.slots - lo - later, 0, FAR);
        for (int64_t j = 0; j < left; ++j) next[j] = base(side) + token(later + j) * side.token;
        std::fill_n(next + left, FAR - left, base(side));
    }
    const uint16_t* ranges(const Side& side) const { return side.range + b * side.range_batch + head() * side.range_head; }

    // Scales and least values of slots from .. from + n - 1, by group of channels.
    void find(const Side& side, int from, int n, Applied& applied) const {
        const uint16_t* base = ranges(side);
        alignas(64) uint16_t scale[TILE] = {}, least[TILE] = {};
        for (int g = 0; g < side.groups; ++g) {
            for (int j = 0; j < n; ++j) {
                const uint16_t* range = base + token(from + j) * side.range_token + g;
                scale[j] = range[0];
                least[j] = range[side.groups];
            }
            for (int j = 0; j < TILE; j += W) {
                store(applied.scale[g] + j, from_half(load<vh>(scale + j)));
                store(applied.least[g] + j, from_half(load<vh>(least + j)));
            }
        }
    }
};

// Asks for the first rows, which no loop before has asked for.  (GCC drops calls of functions that only prefetch.)
__attribute__((always_inline)) inline void fetch(const Side& side, const char* const* rows, int count) {
    const int bytes = Layout::bytes(side);
    for (int j = 0; j < std::min(count, Layout(side).ahead); ++j)
        for (int i = 0; i < bytes; i += LINE) __builtin_prefetch(rows[j] + i);
}

// The item's query rows as fp32 in the keys' layout, scaled, 0 in lanes that come twice.
void load_query(const Item& item, const Layout& lay, float scale, float* q) {
    const Call& c = item.call;
    with_format(c.q_format, false, [&](auto f) {
        for (int r = 0; r < item.rows; ++r) {
            const char* row = c.q + item.b * c.q_batch + item.query_head(r) * c.q_head + item.query(r) * c.q_row;
            const auto read = [&](int channel) { return decltype(f)::plane(decltype(f)::read(row, channel), 0) * scale; };
            for (int p = 0; p < lay.planes; ++p)
                for (int u = 0; u < lay.units; ++u) {
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

// The query's sums over groups of channels: what a group's least value is multiplied by.
void total_query(const Item& item, const Layout& lay, const float* q, Scratch& w) {
    for (int r = 0; r < item.rows; ++r) {
        std::fill_n(w.total[r], GROUPS, 0.0f);
        for (int i = 0; i < lay.planes * lay.units; ++i)
            w.total[r][w.applied.group[i]] += sum(load<vf>(q + r * lay.floats() + i * W));
    }
}

// The query times the scales of a span's channels; its products with their least values go to w.total[r][0].
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

void group_registers(const Layout& lay, Applied& applied) {
    for (int p = 0; p < lay.planes; ++p)
        for (int u = 0; u < lay.units; ++u) applied.group[p * lay.units + u] = lay.channel(p, u) / lay.group;
}

// w.s [rows][count]: the item's scores.
void score(const Item& item, float scale, Scratch& w) {
    const Side& k = item.call.k;
    const Layout lay(k);
    load_query(item, lay, scale, w.q);
    const bool tokens = by_token(k), channels = k.range != nullptr && !tokens, folds = channels && item.ids == nullptr;
    const int range = tokens && k.groups > 1 ? SCALED : channels && !folds ? AFFINE : NONE;
    group_registers(lay, w.applied);
    if (tokens) total_query(item, lay, w.q, w);
    int64_t folded = -1;
    for (int t = 0, n; t < item.count; t += n) {
        n = std::min(TILE, item.count - t);
        if (folds) {
            const int64_t span = (item.lo + t) / k.span;
            n = (int)std::min<int64_t>(n, (span + 1) * k.span - item.lo - t);
            if (span != folded) fold_query(item, lay, item.ranges(k) + span * k.range_token, w);
            folded = span;
        }
        if (tokens) item.find(k, t, n, w.applied);
        if (range == AFFINE)
            for (int j = 0; j < n + KEYS; ++j)
                w.applied.channels[j] = item.ranges(k) + item.token(std::min(t + j, item.count - 1)) / k.span * k.range_token;
        for (int r = 0; r < item.rows; r += RB)
            with_format(k.format, lay.paired, [&](auto f) {
                with_rows(std::min(RB, item.rows - r), [&](auto rows) {
                    using F = decltype(f);
                    constexpr int R = decltype(rows)::value;
                    const char* const* ahead = r == 0 ? w.keys + t + lay.ahead : nullptr;
                    const float* q = (folds ? w.folded : w.q) + r * lay.floats();
                    float* s = w.s + r * STRIDE + t;
                    if constexpr (F::BYTES == 1) {
                        if (range == SCALED) return dots<F, R, SCALED>(lay, w.applied, w.keys + t, ahead, n, q, s);
                        if (range == AFFINE) return dots<F, R, AFFINE>(lay, w.applied, w.keys + t, ahead, n, q, s);
                    }
                    dots<F, R, NONE>(lay, w.applied, w.keys + t, ahead, n, q, s);
                });
            });
        for (int r = 0; r < item.rows && k.range != nullptr && range != AFFINE; ++r)
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

// Softcap, bias and what is hidden from row r; then exp(s - max), whose max and sum are returned.
std::pair<float, float> soften(const Item& item, int r, float* s) {
    const Call& c = item.call;
    const float cap = (float)c.softcap;
    const int64_t h = item.query_head(r);
    int seen = item.count;
    if (c.causal) seen = (int)std::clamp<int64_t>(c.keys - c.n + item.query(r) + 1 - item.lo, 0, item.count);
    if (cap > 0)
        for (int j = 0; j < seen; j += W) store(s + j, tanh(load<vf>(s + j) * (1 / cap)) * cap);
    if (c.bias != nullptr) {
        const float* bias = c.bias + item.b * c.bias_batch + h * c.bias_heads / c.q_heads * c.bias_head + item.lo;
        for (int j = 0; j < seen; ++j) s[j] = bias[j] == -INF ? -INF : s[j] + bias[j];
    }
    std::fill(s + seen, s + (item.count + W - 1) / W * W, -INF);
    vf most_ = splat(-INF);
    for (int j = 0; j < item.count; j += W) most_ = larger(load<vf>(s + j), most_);
    const float m = most(most_);
    vf total = {};
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
    group_registers(lay, w.applied);
    const bool tokens = by_token(v), scaled = tokens && v.groups > 1;
    std::fill_n(w.o, item.rows * lay.floats(), 0.0f);
    for (int r = 0; r < item.rows; ++r) std::fill_n(w.total[r], GROUPS, 0.0f);
    for (int t = 0; t < item.count; t += TILE) {
        const int n = std::min(TILE, item.count - t);
        if (tokens) {
            item.find(v, t, n, w.applied);
            for (int r = 0; r < item.rows; ++r)
                for (int g = 0; g < v.groups; ++g) {
                    vf total = {};
                    for (int j = 0; j < n; j += W) {
                        const vf p = load<vf>(w.s + r * STRIDE + t + j);
                        total += p * load<vf>(w.applied.least[g] + j);
                        if (!scaled) store(w.weights + r * TILE + j, p * load<vf>(w.applied.scale[g] + j));
                    }
                    w.total[r][g] += sum(total);
                }
        }
        const bool plain = !tokens || scaled;
        for (int r = 0; r < item.rows; r += RB)
            with_format(v.format, lay.paired, [&](auto f) {
                with_rows(std::min(RB, item.rows - r), [&](auto rows) {
                    using F = decltype(f);
                    constexpr int R = decltype(rows)::value, U = std::max(1, 4 / F::PLANES);
                    const char* const* ahead = r == 0 ? w.values + t + lay.ahead : nullptr;
                    const float* weights = plain ? w.s + r * STRIDE + t : w.weights + r * TILE;
                    const int stride = plain ? STRIDE : TILE;
                    float* o = w.o + r * lay.floats();
                    const auto units = [&](auto some, int from) {
                        constexpr int N = decltype(some)::value;
                        if constexpr (F::BYTES == 1)
                            if (scaled)
                                return weigh<F, R, N, SCALED>(lay, w.applied, w.values + t, ahead, n, weights, stride, from, o);
                        weigh<F, R, N, NONE>(lay, w.applied, w.values + t, ahead, n, weights, stride, from, o);
                    };
                    int u = 0;
                    for (; u + U <= lay.units; u += U) units(Number<U>(), u);
                    for (; u < lay.units; ++u) units(Number<1>(), u);
                });
            });
    }
    // In order: a lane that comes twice is right the second time.
    for (int r = 0; r < item.rows; ++r) {
        const float* o = w.o + r * lay.floats();
        float* to = out + r * out_stride;
        for (int u = 0; u < lay.units; ++u) {
            if (lay.paired) {
                const vf a = load<vf>(o + u * W), b = load<vf>(o + (lay.units + u) * W);
                store(to + 2 * lay.at(u), zipped<0>(a, b, ALL));
                store(to + 2 * lay.at(u) + W, zipped<W / 2>(a, b, ALL));
                continue;
            }
            for (int p = 0; p < lay.planes; ++p) {
                const int i = p * lay.units + u;
                store(to + lay.channel(p, u), load<vf>(o + i * W) + w.total[r][w.applied.group[i]]);
            }
        }
    }
}

// How the work is cut, and the items' results in call.work: [B, lists, rows, chunks] outputs, then their max and sum.
struct Plan {
    const Call& call;
    int64_t rows, passes, chunks, size;
    explicit Plan(const Call& c) : call(c) {
        rows = c.q_heads / c.lists * c.n;
        passes = (rows + ROWS - 1) / ROWS;
        chunks = (c.slots + CHUNK - 1) / CHUNK;
        size = c.v.size + 2;
    }
    int64_t items() const { return call.batch * call.lists * passes * chunks; }
    float* result(int64_t b, int64_t list, int64_t row, int64_t chunk) const {
        return call.work + (((b * call.lists + list) * rows + row) * chunks + chunk) * size;
    }

    // The item of this number; false where its ids name keys that do not exist.
    bool run(int64_t number) const {
        const Call& c = call;
        const int64_t chunk = number % chunks, pass = number / chunks % passes, row = number / chunks / passes;
        const int64_t b = row / c.lists, list = row % c.lists;
        int64_t lo = chunk * CHUNK, hi = std::min(c.slots, lo + CHUNK);
        if (c.length != nullptr) hi = std::min(hi, c.length[b * c.length_batch + list * c.length_list]);
        if (c.start != nullptr) lo = std::max(lo, c.start[b * c.start_batch]);
        const int64_t* ids = c.ids == nullptr ? nullptr : c.ids + b * c.ids_batch + list * c.ids_list;
        const int64_t first = pass * ROWS;
        const Item item{c, b, list, chunk, first, lo, (int)std::min<int64_t>(ROWS, rows - first), (int)std::max<int64_t>(0, hi - lo), ids};
        bool known = true;
        for (int j = 0; j < item.count && ids != nullptr; ++j) known &= (uint64_t)ids[lo + j] < (uint64_t)c.keys;
        if (!known) return false;
        Scratch w;
        const char* next[FAR];
        item.foresee(c.what == SUM ? c.v : c.k, next);
        if (item.count > 0 && c.what != SCORES) item.find(c.v, w.values, next);
        if (item.count > 0 && c.what != SUM) {
            item.find(c.k, w.keys, c.what == SCORES ? next : w.values);
            fetch(c.k, w.keys, item.count);
            score(item, (float)c.scale, w);
        }
        if (item.count > 0 && c.what != SCORES) fetch(c.v, w.values, item.count);
        if (c.what == SUM) {
            for (int r = 0; r < item.rows; ++r) {
                const char* from = c.q + b * c.q_batch + item.query_head(r) * c.q_head + item.query(r) * c.q_row;
                std::memcpy(w.s + r * STRIDE, from + 4 * lo, 4 * item.count);
                std::fill_n(w.s + r * STRIDE + item.count, W, 0.0f);
            }
        }
        for (int r = 0; r < item.rows && c.what != SUM; ++r) {
            float* s = w.s + r * STRIDE;
            const int64_t place = (b * c.q_heads + item.query_head(r)) * c.n + item.query(r);
            if (c.what == SCORES) {
                std::memcpy(c.out + place * c.slots + lo, s, 4 * item.count);
                continue;
            }
            const auto [m, l] = soften(item, r, s);
            float* to = result(b, list, first + r, chunk) + c.v.size;
            to[0] = m;
            to[1] = l;
            if (c.p != nullptr) std::memcpy(c.p + place * c.slots + lo, s, 4 * item.count);
        }
        if (c.what != SCORES && item.count > 0) weigh(item, result(b, list, first, chunk), chunks * size, w);
        return true;
    }

    // The outputs of all chunks of a query row as one, rows counted over [B, lists, rows].
    void merge(int64_t number) const {
        const Call& c = call;
        const int64_t row = number % rows, list = number / rows % c.lists, b = number / rows / c.lists, dv = c.v.size;
        const float* parts = result(b, list, row, 0);
        const int64_t place = number;  // the query rows of a list are neighbours in out
        float m = -INF, l = 0;
        for (int64_t i = 0; i < chunks; ++i) m = std::max(m, parts[i * size + dv]);
        float* out = c.out + place * dv;
        std::fill_n(out, dv, 0.0f);
        for (int64_t i = 0; i < chunks; ++i) {
            const float* part = parts + i * size;
            const float weight = c.what == SUM ? 1.0f : part[dv + 1] == 0 ? 0.0f : std::exp(part[dv] - m);
            if (weight == 0) continue;
            if (c.what != SUM) l += weight * part[dv + 1];
            for (int64_t x = 0; x < dv; ++x) out[x] += weight * part[x];
        }
        if (c.what == SUM) return;
        const float inverse = l == 0 ? 0.0f : 1 / l;
        for (int64_t x = 0; x < dv; ++x) out[x] *= inverse;
        c.lse[place] = l == 0 ? -INF : m + std::log(l);
        if (c.p == nullptr) return;
        float* p = c.p + place * c.slots;
        const int64_t lo = c.start == nullptr ? 0 : std::clamp<int64_t>(c.start[b * c.start_batch], 0, c.slots);
        const int64_t end = c.length == nullptr ? c.slots : c.length[b * c.length_batch + list * c.length_list];
        const int64_t hi = std::clamp<int64_t>(end, lo, c.slots);
        std::fill(p, p + lo, 0.0f);
        std::fill(p + hi, p + c.slots, 0.0f);
        for (int64_t i = 0; i < chunks; ++i) {
            const float* part = parts + i * size;
            const float weight = part[dv + 1] == 0 ? 0.0f : std::exp(part[dv] - m) * inverse;
            for (int64_t j = std::max(lo, i * CHUNK); j < std::min(hi, (i + 1) * CHUNK); ++j) p[j] *= weight;
        }
    }
};

}  // namespace

extern "C" {

// Runs a call; false where ids name keys that do not exist.
bool kvlib_run(const Call* call) {
    const Plan plan(*call);
    const int64_t items = plan.items(), rows = call->what == SCORES ? 0 : call->batch * call->lists * plan.rows;
    const int threads = (int)std::max<int64_t>(1, std::min(call->threads, items));
    bool known = true;
#pragma omp parallel num_threads(threads) if (threads > 1)
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

const char* kvlib_isa() { return ISA; }

// The sum of all bytes, as 32-bit words: what memory can give this machine's cores.
uint32_t kvlib_read(const char* data, int64_t bytes, int64_t threads) {
    constexpr int64_t PIECE = 1 << 18;
    uint32_t total = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1) reduction(+ : total)
    for (int64_t i = 0; i < bytes / PIECE; ++i) {
        vu acc[8] = {};
        for (const char* at = data + i * PIECE; at < data + (i + 1) * PIECE; at += 32 * W)
            for (int j = 0; j < 8; ++j) acc[j] += load<vu>(at + 4 * W * j);
        for (int j = 1; j < 8; ++j) acc[0] += acc[j];
        for (int j = 0; j < W; ++j) total += acc[0][j];
    }
    return total;
}
}
