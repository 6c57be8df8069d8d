// Memory in huge pages where the system has them: with 4 KB pages, reading a whole matrix costs many TLB misses.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace brlite {

// Zeroed memory; the destructor releases it. The constructor throws std::bad_alloc.
class Memory {
 public:
    explicit Memory(size_t num_bytes);
    ~Memory();
    Memory(Memory&& other) noexcept : data_(other.data_), num_bytes_(other.num_bytes_) { other.data_ = nullptr; }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    uint8_t* data() { return data_; }

 private:
    uint8_t* data_;
    size_t num_bytes_;
};

}  // namespace brlite
