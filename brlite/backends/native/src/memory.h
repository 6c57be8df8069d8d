// Memory in large pages where the system has them: a matrix is read end to end, and a look-up every 4 KB takes time.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace brlite {

// Zeroed memory that is given back at the end. Throws std::bad_alloc.
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
