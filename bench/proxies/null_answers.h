// What the null backend answers and the load client expects, byte for byte. Knows nothing of sockets.
#pragma once

#include <cstdio>
#include <string>
#include <string_view>

// A whole chat completion, 340 bytes.
constexpr std::string_view REPLY =
    R"({"id":"chatcmpl-5f0c7a1b9d3e4f6a8b2c1d0e9f8a7b6c","object":"chat.completion","created":1790000000,"model":"m",)"
    R"("choices":[{"index":0,"message":{"role":"assistant","content":"A fixed answer from a server that computes )"
    R"(nothing."},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":16,"completion_tokens":16,)"
    R"("total_tokens":32}})";

// Event `index` of `count`: a chunk of some 218 bytes, the first with the role, the last with the finish reason. Each
// has its number in it, so that a client sees one that is lost, doubled or out of its place.
inline std::string chunk_event(int index, int count) {
    const char* role = index == 0 ? R"("role":"assistant",)" : "";
    const char* finish_reason = index == count - 1 ? R"("length")" : "null";
    char event[320];
    const int size = snprintf(
        event, sizeof event,
        R"(data: {"id":"chatcmpl-5f0c7a1b9d3e4f6a8b2c1d0e9f8a7b6c","object":"chat.completion.chunk","created":1790000000,)"
        R"("model":"m","choices":[{"index":0,"delta":{%s"content":" token %06d"},"logprobs":null,"finish_reason":%s}]})"
        "\n\n",
        role, index, finish_reason);
    return std::string(event, size);
}

constexpr std::string_view DONE_EVENT = "data: [DONE]\n\n";
