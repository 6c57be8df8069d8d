// What the null backend and the load client share: epoll, buffers that are sent as the socket takes them, and the few
// headers of HTTP/1.1 that they read. They talk to well-behaved programs on the loopback interface only.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>

constexpr int BACKLOG = 4096;
constexpr int MAX_READY = 512;
constexpr size_t READ_BYTES = 256 * 1024;

[[noreturn]] inline void die(const char* doing) {
    perror(doing);
    exit(1);
}

inline sockaddr_in loopback(int port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

inline void send_at_once(int fd) {
    const int yes = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
}

inline void watch(int epoll, int operation, int fd, uint32_t events, void* owner) {
    epoll_event event{};
    event.events = events;
    event.data.ptr = owner;
    if (epoll_ctl(epoll, operation, fd, &event) < 0) die("epoll_ctl");
}

// The value of a header in `head`, without the spaces around it; empty if it is not there.
inline std::string_view header(std::string_view head, std::string_view name) {
    for (size_t at = head.find("\r\n"); at != std::string_view::npos; at = head.find("\r\n", at)) {
        at += 2;
        const std::string_view line = head.substr(at, head.find("\r\n", at) - at);
        if (line.size() <= name.size() || line[name.size()] != ':') continue;
        if (strncasecmp(line.data(), name.data(), name.size()) != 0) continue;
        std::string_view value = line.substr(name.size() + 1);
        while (!value.empty() && value.front() == ' ') value.remove_prefix(1);
        while (!value.empty() && value.back() == ' ') value.remove_suffix(1);
        return value;
    }
    return {};
}

inline bool says(std::string_view value, std::string_view word) {
    return value.size() == word.size() && strncasecmp(value.data(), word.data(), word.size()) == 0;
}

// Bytes on their way out. What the socket does not take is kept until it takes more.
class Outgoing {
 public:
    // False if the connection is broken.
    bool send(int fd, std::string_view bytes) {
        if (kept_.empty()) {
            const ssize_t sent = ::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
            if (sent < 0 && errno != EAGAIN) return false;
            if (sent > 0) bytes.remove_prefix(static_cast<size_t>(sent));
        }
        kept_.append(bytes);
        return true;
    }

    bool send_kept(int fd) {
        const std::string bytes = std::move(kept_);
        kept_.clear();
        return send(fd, bytes);
    }

    bool empty() const { return kept_.empty(); }
    void clear() { kept_.clear(); }

 private:
    std::string kept_;
};
