// Compares `fused` of the generic kernels with fmaf. Prints the first number that differs and exits with 1. The kernels
// run with subnormal numbers flushed to zero; here they are computed, which is stricter.
#define BRLITE_ISA generic
#include <math.h>
#include <stdio.h>

#include "isa.h"
#include "lanes.h"

using namespace brlite;
using namespace brlite::generic;

static uint64_t random_bits() {
    static uint64_t state = 1;
    state = state * 6364136223846793005 + 1442695040888963407;
    uint64_t mixed = (state ^ state >> 32) * 0x9e3779b97f4a7c15;
    return mixed ^ mixed >> 29;
}

static float from_pattern(uint32_t pattern) {
    float value;
    memcpy(&value, &pattern, sizeof value);
    return value;
}

static const float SPECIAL[] = {0.0f, -0.0f,     1.0f,      -1.0f,           INFINITY, -INFINITY,
                                NAN,  0x1p-149f, 0x1p-126f, 0x1.fffffep127f, 0x1p-75f, 0x1.000002p0f};

struct Numbers {
    float a, b, c;
};

// A float of few significant bits, so that products and sums often end in zeros.
static float short_number(int num_bits, int exponent) {
    const int32_t digits = (int32_t)(random_bits() >> (64 - num_bits)) | 1;
    return ldexpf((random_bits() >> 63) ? -digits : digits, exponent);
}

static Numbers of_any_bits() {
    return {from_pattern((uint32_t)random_bits()), from_pattern((uint32_t)random_bits()),
            from_pattern((uint32_t)random_bits())};
}

static Numbers of_near_exponents() {
    const int exponent = (int)(random_bits() % 60) - 30;
    return {short_number(24, -23), short_number(24, -23), short_number(24, exponent - 23)};
}

static Numbers special() {
    const auto any = [] { return SPECIAL[random_bits() % (sizeof SPECIAL / sizeof *SPECIAL)]; };
    const float a = any(), b = any(), c = any();
    return {a, b, random_bits() % 4 ? c : -a * b};
}

// c is a float and the product half of its last place, or nearly: less or more by too little for a double. `exponent`
// is also that of subnormal sums.
static Numbers near_half_of_last_place(int exponent) {
    const float c = short_number(24, exponent - 23);
    int last;
    frexpf(c, &last);
    const int half = (last > -125 ? last - 24 : -149) - 1, of_a = half / 2;
    const float near_1 = 1 + (float)(random_bits() % 4) * 0x1p-23f, nearly = 1 - (float)(random_bits() % 8) * 0x1p-24f;
    const float sign = random_bits() % 2 ? -1.0f : 1.0f;
    return {ldexpf(near_1, of_a), ldexpf(sign * nearly, half - of_a), c};
}

// The product has 25 bits, halfway between two floats, and c is much less.
static Numbers half_with_little(int exponent) {
    const int of_a = exponent / 2;
    return {short_number(12, of_a), short_number(13, exponent - of_a),
            short_number(24, exponent - 40 - random_bits() % 60)};
}

static Numbers next(int kind) {
    const int exponent = (int)(random_bits() % 250) - 150;
    switch (kind) {
        case 0:
            return of_any_bits();
        case 1:
            return of_near_exponents();
        case 2:
            return special();
        case 3:
            return near_half_of_last_place(exponent);
        case 4:
            return half_with_little(exponent);
        default:  // what the kernels multiply: an integer by a scale of few bits
            return {short_number(20, 0), short_number(8, -12), short_number(24, -20)};
    }
}

int main() {
    constexpr int NUM_KINDS = 6, NUM_VECTORS = 600000;
    for (int vector = 0; vector < NUM_VECTORS; vector++) {
        float a[LANES], b[LANES], c[LANES], found[LANES];
        for (int i = 0; i < LANES; i++) {
            // Whole vectors of one kind, and vectors in which one number is of it.
            const Numbers numbers = next(vector % 2 == 0 || i == vector % LANES ? vector / 2 % NUM_KINDS : 1);
            a[i] = numbers.a, b[i] = numbers.b, c[i] = numbers.c;
        }
        store(found, fused(load(a), load(b), load(c)));
        for (int i = 0; i < LANES; i++) {
            const float expected = fmaf(a[i], b[i], c[i]);
            if (isnan(expected) ? isnan(found[i]) : !memcmp(&found[i], &expected, sizeof expected)) continue;
            printf("%a * %a + %a: %a, not %a\n", a[i], b[i], c[i], found[i], expected);
            return 1;
        }
    }
}
