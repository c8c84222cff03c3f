// One step of an agent, from the observation to the heads. See collectors/compiled_step.py.
//
//     features = E x;  h = step of the memory;  joint = LayerNorm(group norm(h)) + LayerNorm(features)
//     policy, value = H joint + b
//
// Rows are processed in blocks, so that all intermediate values of a block stay in the cache.

#include "gated_recurrence.h"
#include "lstm.h"
#include "norms.h"

namespace {

// Rows per block: two passes of the 8-row kernel in multiply.h.
constexpr int64_t BLOCK = 16;

// mapped: input width of the memory's linear map. It equals `observed` (input x) or `channels` (input features).
struct Agent { int64_t observed, mapped, channels, group, actions; double group_eps, layer_eps; };

// A memory declares the columns of its map in multiples of its channels, the size of its other parameters, and a step
// of some rows. `inputs` is the output of the map, bias included. The step may overwrite it. `before` and `after` are
// the states.
template <class T> struct LRU {
    static constexpr int64_t maps = 3, states = 1;
    static int64_t others(int64_t D) { return D; }
    static void step(int64_t rows, int64_t D, T* inputs, const T* rate, const T* const* before, T* const* after) {
        // The caller has already applied resets to the states.
        const uint8_t never[BLOCK] = {};
        const T* const in[] = {inputs, rate, before[0], before[0]};
        recur<T>({1, rows, D, 0, 0, 0.0}, in, never, after, {0, 0, rows});
    }
};

template <class T> struct LSTM {
    static constexpr int64_t maps = 4, states = 2;
    static int64_t others(int64_t D) { return D * 4 * D; }
    static void step(int64_t rows, int64_t D, T* inputs, const T* weight, const T* const* before, T* const* after) {
        multiply<T>(before[0], weight, inputs, rows, D, 4 * D);
        for (int64_t row = 0; row < rows; ++row)
            cell_step<T, false>(D, inputs + row * 4 * D, before[1] + row * D, after[1] + row * D, after[0] + row * D);
    }
};

// Addresses of the parameters, which are stored one after the other in one array.
template <class T, template <class> class Memory> struct Parameters {
    const T *encoder, *map, *bias, *others, *past, *past_bias, *present, *present_bias, *heads, *heads_bias;
    Parameters(const Agent& agent, const T* at) {
        const auto next = [&at](int64_t size) { const T* own = at; at += size; return own; };
        const int64_t D = agent.channels, columns = Memory<T>::maps * D;
        encoder = next(agent.observed * D), map = next(agent.mapped * columns), bias = next(columns);
        others = next(Memory<T>::others(D));
        past = next(D), past_bias = next(D), present = next(D), present_bias = next(D);
        heads = next((agent.actions + 1) * D), heads_bias = next(agent.actions + 1);
    }
};

// The heads have few rows, so vectors run along the channels and their lanes are added at the end.
template <class T> INLINE T dot(const T* a, const T* b, int64_t size) {
    Vec<T> total{};
    for (int64_t d = 0; d < size; d += W<T>) {
        const int k = int(std::min<int64_t>(W<T>, size - d));
        total += load<T>(a + d, k) * load<T>(b + d, k);
    }
    return sum<T>(total);
}

template <class T, template <class> class Memory>
void act(const Agent& agent, const T* parameters, const T* x, const T* const* before, T* const* after, T* policy,
         T* value, int64_t first, int64_t end) {
    const Parameters<T, Memory> p(agent, parameters);
    const int64_t D = agent.channels, A = agent.actions, columns = Memory<T>::maps * D;
    // One allocation per thread and step holds the intermediate values of a block.
    const Room<T> room(BLOCK * (3 * D + columns));
    T *features = room.data(), *readout = features + BLOCK * D, *joint = readout + BLOCK * D, *inputs = joint + BLOCK * D;
    for (int64_t row = first; row < end; row += BLOCK) {
        const int64_t rows = std::min(BLOCK, end - row);
        const T *seen = x + row * agent.observed, *mapped = agent.mapped == agent.observed ? seen : features;
        const T* befores[Memory<T>::states];
        T* afters[Memory<T>::states];
        for (int64_t i = 0; i < Memory<T>::states; ++i) befores[i] = before[i] + row * D, afters[i] = after[i] + row * D;
        // `multiply` adds to its output: start at zero, or at the bias.
        std::fill(features, features + rows * D, T(0));
        multiply<T>(seen, p.encoder, features, rows, agent.observed, D);
        for (int64_t i = 0; i < rows; ++i) std::memcpy(inputs + i * columns, p.bias, columns * sizeof(T));
        multiply<T>(mapped, p.map, inputs, rows, agent.mapped, columns);
        Memory<T>::step(rows, D, inputs, p.others, befores, afters);
        const T* const of_norm[] = {afters[0], nullptr};
        norm<T>({1, rows, D, agent.group, 0, agent.group_eps}, of_norm, nullptr, &readout, {0, 0, rows});
        const T* const of_norms[] = {readout, p.past, p.past_bias, features, p.present, p.present_bias};
        added_norms<T>({1, rows, D, 0, 0, agent.layer_eps}, of_norms, nullptr, &joint, {0, 0, rows});
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t a = 0; a < A; ++a)
                policy[(row + i) * A + a] = dot<T>(joint + i * D, p.heads + a * D, D) + p.heads_bias[a];
            value[row + i] = dot<T>(joint + i * D, p.heads + A * D, D) + p.heads_bias[A];
        }
    }
}

}  // namespace

#define ACT_OF(T, name, Memory, memory)                                                                         \
    extern "C" void cyborg_act_##memory##_##name(const int64_t* sizes, double group_eps, double layer_eps,            \
                                                 int64_t batch, int64_t threads, const T* parameters, const T* x,     \
                                                 const T* const* before, T* const* after, T* policy, T* value) {      \
        const Agent agent{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], group_eps, layer_eps};                    \
        split(batch, threads, [=](int64_t, int64_t first, int64_t end) {                                              \
            act<T, Memory>(agent, parameters, x, before, after, policy, value, first, end);                           \
        });                                                                                                           \
    }
#define ACT(T, name) ACT_OF(T, name, LRU, lru) ACT_OF(T, name, LSTM, lstm)
ACT(float, float32)
ACT(double, float64)
