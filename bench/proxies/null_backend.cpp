// An OpenAI-compatible server that costs next to nothing: one thread, epoll, answers that stand ready. Behind a proxy
// it shows what the proxy costs. bench/proxy.py compiles and starts it.
//
//     null_backend PORT EVENTS PACE_MS
//
// A POST is answered with REPLY, or, if its body says "stream": true, with max_tokens (else EVENTS) events, each in an
// HTTP chunk and a send of its own. All streams get one event every PACE_MS, as from an engine whose step computes a
// token of each; with 0 as fast as they are taken. Bodies need a Content-Length. It listens on the loopback interface
// only.
#include <fcntl.h>
#include <sys/timerfd.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "null_answers.h"
#include "sockets.h"

namespace {

constexpr std::string_view MODELS =
    R"({"object":"list","data":[{"id":"m","object":"model","created":1790000000,"owned_by":"nobody"}]})";

struct Connection {
    explicit Connection(int socket) : fd(socket) {}

    const int fd;
    std::string in;
    Outgoing out;
    bool is_chunked = true;  // HTTP/1.0 has no chunks: there the end of the connection ends the answer
    bool is_last = false;    // close when all is sent
    bool is_broken = false;
    bool is_out_watched = false;
    int next_event = 0;
    int num_events = 0;  // of the stream that runs; 0 if none does

    bool is_streaming() const { return num_events > 0; }
    bool is_over() const { return is_broken || (is_last && !is_streaming() && out.empty()); }

    void send(std::string_view bytes) { is_broken |= !out.send(fd, bytes); }
};

class Backend {
 public:
    Backend(int port, int num_events, int pace_ms) : default_events_(num_events), pace_ms_(pace_ms) {
        epoll_ = epoll_create1(0);
        listen_on(port);
        if (pace_ms_ > 0) start_timer();
    }

    [[noreturn]] void run() {
        epoll_event ready[MAX_READY];
        for (;;) {
            const bool is_flooding = pace_ms_ == 0 && !streams_.empty();
            const int count = epoll_wait(epoll_, ready, MAX_READY, is_flooding ? 0 : -1);
            for (int i = 0; i < count; i++) handle(ready[i]);
            if (is_flooding) step();
            sweep();
        }
    }

 private:
    void listen_on(int port) {
        listener_ = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        const int yes = 1;
        setsockopt(listener_, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
        const sockaddr_in address = loopback(port);
        if (bind(listener_, reinterpret_cast<const sockaddr*>(&address), sizeof address) < 0) die("bind");
        if (listen(listener_, BACKLOG) < 0) die("listen");
        watch(epoll_, EPOLL_CTL_ADD, listener_, EPOLLIN, &listener_);
    }

    void start_timer() {
        timer_ = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
        itimerspec every{};
        every.it_interval.tv_sec = pace_ms_ / 1000;
        every.it_interval.tv_nsec = pace_ms_ % 1000 * 1000000L;
        every.it_value = every.it_interval;
        if (timerfd_settime(timer_, 0, &every, nullptr) < 0) die("timerfd_settime");
        watch(epoll_, EPOLL_CTL_ADD, timer_, EPOLLIN, &timer_);
    }

    void handle(const epoll_event& event) {
        if (event.data.ptr == &listener_) return accept_all();
        if (event.data.ptr == &timer_) return tick();
        auto& connection = *static_cast<Connection*>(event.data.ptr);
        if (event.events & EPOLLOUT) connection.is_broken |= !connection.out.send_kept(connection.fd);
        if (event.events & ~EPOLLOUT) read(connection);
        settle(connection);
    }

    void accept_all() {
        for (int fd; (fd = accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK)) >= 0;) {
            send_at_once(fd);
            watch(epoll_, EPOLL_CTL_ADD, fd, EPOLLIN, new Connection(fd));
        }
    }

    // Steps that were missed are not made up for: an engine that is late does not hurry either.
    void tick() {
        uint64_t missed;
        if (::read(timer_, &missed, sizeof missed) == sizeof missed) step();
    }

    void step() {
        for (size_t i = 0; i < streams_.size(); i++) {
            Connection& connection = *streams_[i];
            if (connection.out.empty() && !connection.is_broken) send_event(connection);
            settle(connection);
            if (connection.is_streaming() && !connection.is_broken) continue;
            streams_[i--] = streams_.back();
            streams_.pop_back();
        }
    }

    void send_event(Connection& connection) {
        std::string bytes = framed(connection, chunk_event(connection.next_event, connection.num_events));
        if (++connection.next_event == connection.num_events) {
            bytes += framed(connection, DONE_EVENT);
            if (connection.is_chunked) bytes += "0\r\n\r\n";
            connection.num_events = 0;
        }
        connection.send(bytes);
    }

    static std::string framed(const Connection& connection, std::string_view event) {
        if (!connection.is_chunked) return std::string(event);
        char size[16];
        snprintf(size, sizeof size, "%zx\r\n", event.size());
        return std::string(size).append(event).append("\r\n");
    }

    void read(Connection& connection) {
        const ssize_t count = recv(connection.fd, buffer_.data(), buffer_.size(), 0);
        if (count < 0 && errno == EAGAIN) return;
        if (count <= 0) {
            connection.is_broken = true;
            return;
        }
        connection.in.append(buffer_.data(), static_cast<size_t>(count));
        answer_whole(connection);
    }

    // Nobody here sends a request before the last one is answered.
    void answer_whole(Connection& connection) {
        const std::string_view in = connection.in;
        const size_t end = in.find("\r\n\r\n");
        if (end == std::string_view::npos) return;
        const std::string_view head = in.substr(0, end + 2);
        const size_t body_size = strtoul(std::string(header(head, "Content-Length")).c_str(), nullptr, 10);
        if (in.size() < end + 4 + body_size) return;
        answer(connection, head, in.substr(end + 4, body_size));
        connection.in.clear();
    }

    void answer(Connection& connection, std::string_view head, std::string_view body) {
        connection.is_chunked = head.substr(0, head.find("\r\n")).find("HTTP/1.1") != std::string_view::npos;
        connection.is_last = connection.is_chunked ? says(header(head, "Connection"), "close")
                                                   : !says(header(head, "Connection"), "keep-alive");
        if (!header(head, "Transfer-Encoding").empty()) {
            connection.is_last = true;
            return send_json(connection, "411 Length Required", R"({"error":{"message":"send a Content-Length"}})");
        }
        if (head.substr(0, 5) == "POST ") return answer_post(connection, body);
        if (head.substr(0, 12) == "GET /health ") return send_json(connection, "200 OK", R"({"status":"ok"})");
        if (head.substr(0, 15) == "GET /v1/models ") return send_json(connection, "200 OK", MODELS);
        send_json(connection, "404 Not Found", R"({"error":{"message":"there is nothing here"}})");
    }

    void answer_post(Connection& connection, std::string_view body) {
        if (!has(body, R"("stream":true)") && !has(body, R"("stream": true)"))
            return send_json(connection, "200 OK", REPLY);
        connection.is_last |= !connection.is_chunked;
        connection.next_event = 0;
        connection.num_events = wanted_events(body);
        streams_.push_back(&connection);
        std::string head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n";
        head += connection.is_chunked ? "Transfer-Encoding: chunked\r\n" : "Connection: close\r\n";
        connection.send(head + "\r\n");
    }

    // Some proxies rename max_tokens; "max_completion_tokens" has no other meaning here.
    int wanted_events(std::string_view body) const {
        for (const std::string_view name : {R"("max_tokens":)", R"("max_completion_tokens":)"}) {
            const size_t at = body.find(name);
            if (at == std::string_view::npos) continue;
            const int wanted = atoi(std::string(body.substr(at + name.size(), 12)).c_str());
            if (wanted > 0) return wanted;
        }
        return default_events_;
    }

    static bool has(std::string_view text, std::string_view words) {
        return memmem(text.data(), text.size(), words.data(), words.size()) != nullptr;
    }

    void send_json(Connection& connection, const char* status, std::string_view body) {
        char head[160];
        const int size = snprintf(head, sizeof head,
                                  "HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n%s\r\n",
                                  status, body.size(), connection.is_last ? "Connection: close\r\n" : "");
        connection.send(std::string(head, size).append(body));
    }

    // After anything was done with a connection: watch for what it waits for, and remember it if it is over.
    void settle(Connection& connection) {
        if (connection.is_over()) {
            over_.push_back(&connection);
            return;
        }
        if (connection.is_out_watched != connection.out.empty()) return;
        connection.is_out_watched = !connection.is_out_watched;
        const uint32_t events = connection.is_out_watched ? EPOLLIN | EPOLLOUT : EPOLLIN;
        watch(epoll_, EPOLL_CTL_MOD, connection.fd, events, &connection);
    }

    // Only between two rounds of events: one that is still to be handled may name a connection that is over.
    void sweep() {
        std::sort(over_.begin(), over_.end());  // some were noticed twice
        over_.erase(std::unique(over_.begin(), over_.end()), over_.end());
        for (const Connection* connection : over_) {
            streams_.erase(std::remove(streams_.begin(), streams_.end(), connection), streams_.end());
            close(connection->fd);
            delete connection;
        }
        over_.clear();
    }

    int epoll_ = -1;
    int listener_ = -1;
    int timer_ = -1;
    int default_events_;
    int pace_ms_;
    std::vector<Connection*> streams_, over_;
    std::string buffer_ = std::string(READ_BYTES, '\0');
};

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: null_backend PORT EVENTS PACE_MS\n");
        return 2;
    }
    Backend(atoi(argv[1]), atoi(argv[2]), atoi(argv[3])).run();
}
