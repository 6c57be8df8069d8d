// The fields of `brlite_draw`, in order: the one list for C++ (brlite.h) and Python (abi.py reads this file).
// A PARAMETER is copied unchanged from the field of the same name of SamplingParams. No include guard: brlite.h defines
// FIELD and PARAMETER, and then includes this file.
// clang-format off
FIELD(int32_t, row)
FIELD(int32_t, target)                     // a token whose logprob is wanted; -1: draw one
FIELD(float, temperature)                  // 0: greedy
FIELD(int32_t, top_k)                      // vocabulary size: off
PARAMETER(double, top_p)
PARAMETER(double, min_p)
PARAMETER(double, top_n_sigma)             // 0: off
PARAMETER(double, typical_p)               // 1: off
PARAMETER(double, xtc_probability)         // 0: off
PARAMETER(double, xtc_threshold)
PARAMETER(double, dynatemp_range)          // 0: off
PARAMETER(double, dynatemp_exponent)
FIELD(double, uniform)
FIELD(int32_t, num_logprobs)               // -1: no logprobs; else the number of alternatives beside the token's own
FIELD(int32_t, num_biases)
FIELD(int32_t, num_banned)
FIELD(int32_t, num_counted)
FIELD(int32_t, num_costs)
PARAMETER(double, repetition_penalty)
PARAMETER(double, presence_penalty)
PARAMETER(double, frequency_penalty)
FIELD(const int32_t*, bias_ids)
FIELD(const float*, biases)
FIELD(const int32_t*, banned_ids)
FIELD(const int32_t*, counted_ids)
FIELD(const int32_t*, output_counts)
FIELD(const int32_t*, cost_ids)
FIELD(const float*, costs)                 // taken off the logits of `cost_ids`, after the penalties
FIELD(const int32_t*, mask)                // null, or [ceil(vocabulary / 32)]: bit t % 32 of word t / 32 allows token t
FIELD(const uint8_t*, is_mask_filled)      // null, or 1 once another thread has filled `mask`; a draw waits for 1
FIELD(const int32_t*, allowed)             // as `mask`, for every draw of the request: its allowed_token_ids
FIELD(float*, logits)                      // null, or [vocabulary]: a step copies the row there, before all edits
